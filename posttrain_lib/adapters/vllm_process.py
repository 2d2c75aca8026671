"""vLLM in a process of its own: it starts threads, sets defaults and keeps memory that this one must not get."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: One process, no affinity, a small cache: what vLLM's CPU build needs on a machine shared with a trainer. And no
#: torch.compile: some of vLLM's functions carry it even in eager mode, and it would need a C++ compiler.
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
QUIET_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

#: lines of the process's output that an error shows
SHOWN_LINES = 25


class Failed(Exception):
    """The process gave no answer; the text says how it ended, with its last lines."""


def is_available() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """This process's environment as vLLM's gets it, with ``environment`` above all."""
    # Ray pins OpenMP to one thread for its workers; vLLM may use every core.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**inherited, **CPU_ENVIRONMENT, **QUIET_ENVIRONMENT, **environment}


def ask(
    module: str, question: Mapping[str, Any], timeout_seconds: float, environment: Mapping[str, str] | None = None
) -> Any:
    """Run ``python -m module QUESTION ANSWER`` on files of JSON and return the answer.

    Raises:
        Failed: it crashed, answered nothing, or took longer than ``timeout_seconds``.
    """
    with tempfile.TemporaryDirectory(prefix="posttrain-vllm-") as folder:
        asked, answer, log = (Path(folder) / name for name in ("question.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(question), encoding="utf-8")
        with open(log, "w", encoding="utf-8") as output:
            try:
                code: int | None = subprocess.run(
                    [sys.executable, "-m", module, str(asked), str(answer)],
                    env=variables(environment or {}),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_seconds,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        if code != 0 or not answer.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
            ended = f"no answer in {timeout_seconds:.0f} s" if code is None else f"exit code {code}"
            raise Failed("\n".join([ended, *lines]))
        return json.loads(answer.read_text(encoding="utf-8"))
