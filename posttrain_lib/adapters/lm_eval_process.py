"""EleutherAI's lm-evaluation-harness in a process of its own, on a Hugging Face folder.

It is not among the locked packages; its results are what the installed version says they are, which is recorded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ConfigError, VerificationError

#: half the width of a 95% interval in standard errors
_NORMAL_95 = 1.959964
_STANDARD_ERROR = "_stderr"
#: lines of the process's output that an error shows
_SHOWN = 25


def is_available() -> bool:
    """Whether lm-evaluation-harness is installed."""
    return importlib.util.find_spec("lm_eval") is not None


def check_installed() -> None:
    """Raises ConfigError, saying what to install, where it is not."""
    if not is_available():
        raise ConfigError(
            "evaluation.lm_eval needs lm-evaluation-harness, which is not installed",
            where="evaluation.lm_eval",
            got="no module lm_eval",
            expected="an environment with lm_eval, version 0.4 or later",
            fix="./infra/env pip install 'lm_eval[hf]' (it is not among the locked packages), or leave the section out",
        )


def command(
    folder: str | Path,
    out: str | Path,
    *,
    tasks: tuple[str, ...],
    include_path: str | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    device: str,
    apply_chat_template: bool,
) -> list[str]:
    """The command line that evaluates ``folder`` and writes its results below ``out``."""
    line = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}"]
    line += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--device", device]
    line += ["--output_path", str(out)]
    line += [] if include_path is None else ["--include_path", include_path]
    line += [] if limit is None else ["--limit", str(limit)]
    line += [] if num_fewshot is None else ["--num_fewshot", str(num_fewshot)]
    return [*line, "--apply_chat_template"] if apply_chat_template else line


def evaluate(folder: str | Path, out: Path, *, timeout_seconds: float, **options: Any) -> dict[str, Any]:
    """Run it and return its results JSON; ``options`` are those of :func:`command`. Its output goes to ``out/log.txt``.

    Raises:
        ConfigError: it is not installed.
        VerificationError: it ended with an error, took too long, or wrote no results.
    """
    check_installed()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with open(log, "w", encoding="utf-8") as output:
        try:
            line = command(folder, out / "results", **options)
            done = subprocess.run(
                line, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=timeout_seconds, check=False
            )
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    written = sorted((out / "results").rglob("*.json"))
    if code != 0 or not written:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN:]
        raise VerificationError(
            "lm-evaluation-harness gave no results",
            where=log,
            got=("no end in time" if code is None else f"exit code {code}")
            + "".join(f"\n    {line}" for line in lines),
            fix="look at its log; tasks are listed by python -m lm_eval --tasks list",
        )
    found: dict[str, Any] = json.loads(written[-1].read_text(encoding="utf-8"))
    return found


def comparison_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows as ``evaluation.comparison.compare``'s of a results JSON, the exported model as "after".

    A task's metrics stand in ``results[task]`` as "metric,filter" with their standard errors as "metric_stderr,filter"
    ("N/A" where there is none). An interval is the mean and 1.96 standard errors either way. ``higher_is_better`` has
    a bool for each metric of a task.

    Raises:
        VerificationError: no such shape.
    """
    tasks = results.get("results")
    if not isinstance(tasks, Mapping):
        raise VerificationError(
            "the results of lm-evaluation-harness have no 'results'", got=", ".join(results), expected="version 0.4's"
        )
    counts, better = results.get("n-samples", {}), results.get("higher_is_better", {})
    rows = []
    for task, figures in tasks.items():
        for key, mean in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith(_STANDARD_ERROR) or not isinstance(mean, int | float):
                continue
            error = figures.get(f"{metric}{_STANDARD_ERROR},{kind}")
            half = _NORMAL_95 * error if isinstance(error, int | float) else None
            rows.append(
                {
                    "task": f"lm_eval {task}",
                    "metric": metric if kind == "none" else f"{metric} ({kind})",
                    "group": "all",
                    "better": {True: "higher", False: "lower"}.get(better.get(task, {}).get(metric)),
                    "unit": "",
                    "before": None,
                    "after": {
                        "mean": float(mean),
                        "low": None if half is None else mean - half,
                        "high": None if half is None else mean + half,
                        "examples": counts.get(task, {}).get("effective"),
                    },
                    "difference": None,
                    "verdict": "",
                    "baseline": None,
                }
            )
    return rows
