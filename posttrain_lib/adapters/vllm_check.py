"""What vLLM makes of an exported folder: greedy tokens and the log-probs it gives them.

vLLM runs in a process of its own: it sets threads and allocators for the whole process, and its memory must be gone
when the comparison is done. ``generate`` starts that process; ``python -m posttrain_lib.adapters.vllm_check`` is it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain_lib.errors import ExportError

#: One process, no affinity, a small cache: what vLLM's CPU build needs on a machine shared with a trainer. And no
#: torch.compile: some of vLLM's functions carry it even in eager mode, and it would need a C++ compiler.
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
QUIET_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


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


def is_available() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def generate(request: Request, *, timeout_seconds: float = 600.0) -> Answer:
    """Load the folder in vLLM and decode greedily.

    Raises:
        ExportError: vLLM does not load the folder, crashes, or takes longer than ``timeout_seconds``.
    """
    with tempfile.TemporaryDirectory(prefix="posttrain-vllm-") as folder:
        question, reply, log = (Path(folder) / name for name in ("request.json", "answer.json", "log.txt"))
        question.write_text(json.dumps(asdict(request)), encoding="utf-8")
        command = [sys.executable, "-m", "posttrain_lib.adapters.vllm_check", str(question), str(reply)]
        environment = {**os.environ, **CPU_ENVIRONMENT, **QUIET_ENVIRONMENT}
        environment.pop("OMP_NUM_THREADS", None)  # Ray pins it to 1 for its workers; vLLM may use every core
        with open(log, "w", encoding="utf-8") as output:
            try:
                code = subprocess.run(
                    command,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_seconds,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise ExportError(
                    "vLLM did not answer in time", where=request.folder, got=f"{timeout_seconds:.0f} s", fix=_tail(log)
                ) from error
        if code != 0 or not reply.is_file():
            raise ExportError(
                "vLLM does not load the exported folder",
                where=request.folder,
                got=f"exit code {code}\n{_tail(log)}",
                expected="a folder that vLLM serves",
                fix="see vLLM's last lines above; export.verify_vllm: false skips this proof",
            )
        return Answer(**json.loads(reply.read_text(encoding="utf-8")))


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


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
