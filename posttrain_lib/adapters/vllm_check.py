"""What vLLM makes of an exported folder: greedy tokens and the log-probs it gives them.

``generate`` starts a process for it (see ``vllm_process``); ``python -m posttrain_lib.adapters.vllm_check`` is it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain_lib.adapters import vllm_process
from posttrain_lib.errors import ExportError


@dataclass(frozen=True)
class Request:
    """Prompts as token ids; ``max_model_len`` bounds vLLM's cache."""

    folder: str
    prompts: list[list[int]]
    new_tokens: int
    dtype: str
    max_model_len: int


@dataclass(frozen=True)
class Answer:
    """Per prompt: the greedy tokens, their log-probs, and log-probs of prompt tokens 1.. (the first has none)."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    prompt_logprobs: list[list[float]]
    texts: list[str]
    version: str


def generate(request: Request, *, timeout_seconds: float = 600.0) -> Answer:
    """Load the folder in vLLM and decode greedily.

    Raises:
        ExportError: vLLM does not load the folder, crashes, or takes longer than ``timeout_seconds``.
    """
    try:
        return Answer(**vllm_process.ask("posttrain_lib.adapters.vllm_check", asdict(request), timeout_seconds))
    except vllm_process.Failed as error:
        raise ExportError(
            "vLLM does not load the exported folder",
            where=request.folder,
            got=error,
            expected="a folder that vLLM serves",
            fix="see vLLM's last lines above; export.verify_vllm: false skips this proof",
        ) from error


def _serve(request: Request) -> Answer:
    import torch
    import vllm

    engine = vllm.LLM(
        model=request.folder,
        dtype=request.dtype,
        max_model_len=request.max_model_len,
        enforce_eager=True,
        disable_log_stats=True,
        seed=0,
        **({"gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {}),
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=request.new_tokens, logprobs=1, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": ids} for ids in request.prompts]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    return Answer(
        token_ids=[list(done.token_ids) for done in completions],
        logprobs=[
            [float(table[token].logprob) for token, table in zip(done.token_ids, done.logprobs, strict=True)]
            for done in completions
        ],
        prompt_logprobs=[
            [float(table[token].logprob) for token, table in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(request.prompts, outputs, strict=True)
        ],
        texts=[done.text for done in completions],
        version=vllm.__version__,
    )


def _main(question: str, reply: str) -> None:
    request = Request(**json.loads(Path(question).read_text(encoding="utf-8")))
    Path(reply).write_text(json.dumps(asdict(_serve(request))), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
