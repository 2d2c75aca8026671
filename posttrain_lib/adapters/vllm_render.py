"""What vLLM's OpenAI server makes of chat requests: the token ids that it would put before the model.

The ids come from the code that serves: the request's pydantic model, the parsing of its messages, the choice of the
renderer (the chat template, Harmony, or another of vLLM's own) and the tokenizer that vLLM loads, put together as
``vllm launch render`` does, which is the server without an engine. No weights are read. vLLM runs in a process of its
own, for the reasons that ``vllm_process`` gives; ``python -m posttrain_lib.adapters.vllm_render`` is that process.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.adapters import vllm_process
from posttrain_lib.errors import DataError

#: the date that vLLM's Harmony code prints; what it is called there
_HARMONY_DATE = "VLLM_SYSTEM_START_DATE"


@dataclass(frozen=True)
class Request:
    """Chats to render, each a dict of ``messages`` and ``tools`` as a client sends them and template ``variables``.

    ``folder`` holds config.json, tokenizer and template; ``variables`` are the server's own defaults for the template;
    ``date`` (ISO) is the day on which the server is asked.
    """

    folder: str
    chats: list[dict[str, Any]]
    variables: dict[str, Any]
    date: str


@dataclass(frozen=True)
class Answer:
    """Per chat: the prompt's ids, or none and the reason why vLLM refuses the request ("" where it does not).

    ``stop_ids`` end a generation. ``renderer`` names what rendered, and ``by_template`` says whether that was the
    chat template; else it was code of vLLM's.
    """

    prompts: list[list[int]]
    refusals: list[str]
    stop_ids: list[int]
    renderer: str
    by_template: bool
    version: str


def render(request: Request, *, timeout_seconds: float = 600.0) -> Answer:
    """Render every chat as the server would.

    Raises:
        DataError: vLLM does not take the folder, crashes, or takes longer than ``timeout_seconds``.
    """
    module, environment = "posttrain_lib.adapters.vllm_render", {_HARMONY_DATE: request.date}
    try:
        return Answer(**vllm_process.ask(module, asdict(request), timeout_seconds, environment))
    except vllm_process.Failed as error:
        raise DataError(
            "vLLM renders no chat with this tokenizer and model configuration",
            where=request.folder,
            got=error,
            expected="a folder that vLLM serves",
            fix="see vLLM's last lines above; data.serving_check: off trains without this proof",
        ) from error


async def _render_all(request: Request) -> Answer:
    import vllm
    from vllm import AsyncEngineArgs
    from vllm.config import VllmConfig
    from vllm.renderers import renderer_from_config
    from vllm.renderers.hf import HfRenderer
    from vllm.renderers.online_renderer import OnlineRenderer

    model_config = AsyncEngineArgs(model=request.folder).create_model_config()
    model_config.quantization = None  # as the render server has it: no weights, so no kernels to look for
    renderer = renderer_from_config(VllmConfig(model_config=model_config))
    today = datetime.date.fromisoformat(request.date)
    online = OnlineRenderer(
        model_config=model_config,
        renderer=renderer,
        request_logger=None,
        chat_template=None,  # the folder's own
        chat_template_content_format="auto",
        # Templates that ask for the day call strftime_now; this is how a server of that day answers.
        default_chat_template_kwargs={"strftime_now": today.strftime, **request.variables},
    )
    prompts, refusals = [], []
    for chat in request.chats:
        ids, refusal = await _render_one(online, request, chat)
        prompts.append(ids)
        refusals.append(refusal)
    return Answer(
        prompts=prompts,
        refusals=refusals,
        stop_ids=_stop_ids(model_config, renderer),
        renderer="Harmony" if online.use_harmony else type(renderer).__name__,
        by_template=isinstance(renderer, HfRenderer) and not online.use_harmony,
        version=vllm.__version__,
    )


async def _render_one(online: Any, request: Request, chat: dict[str, Any]) -> tuple[list[int], str]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.exceptions import VLLMClientError

    body: dict[str, Any] = {"model": request.folder, "messages": chat["messages"]}
    if chat["tools"]:
        # "none" needs no parser of calls, and the tools are in the prompt all the same.
        body.update(tools=chat["tools"], tool_choice="none")
    if chat["variables"]:
        body["chat_template_kwargs"] = chat["variables"]
    if "reasoning_effort" in request.variables:
        # Code of vLLM's reads it from the request, where a template has it as a variable.
        body["reasoning_effort"] = request.variables["reasoning_effort"]
    try:
        result = await online.render_chat(ChatCompletionRequest.model_validate(body), skip_mm_cache=True)
    except (ValueError, VLLMClientError) as error:  # what the server answers with status 400
        return [], str(error) or repr(error)
    if isinstance(result, ErrorResponse):
        return [], result.error.message
    _, (prompt,) = result
    return list(prompt["prompt_token_ids"]), ""


def _stop_ids(model_config: Any, renderer: Any) -> list[int]:
    """Ids that end a generation: those that the engine puts into a request that names none."""
    from vllm import SamplingParams

    sampling = SamplingParams()
    sampling.update_from_generation_config(model_config.try_get_generation_config(), renderer.get_eos_token_id())
    return sorted(sampling.all_stop_token_ids)


def _main(question: str, reply: str) -> None:
    request = Request(**json.loads(Path(question).read_text(encoding="utf-8")))
    answer = asyncio.run(_render_all(request))
    Path(reply).write_text(json.dumps(asdict(answer)), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
