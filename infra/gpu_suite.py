"""Run every test marked ``gpu`` and record what ran, where and when. One command, for a bare GPU machine:

    python infra/gpu_suite.py

Needs Python 3.11 or newer, PyTorch with CUDA, transformers, numpy, safetensors and pytest; no Ray, vLLM, verl, Metaflow
or pydantic, no network and no install. Writes ``infra/results/gpu-suite.json`` (``--output`` names another file). On a
machine without a CUDA device it says so, writes nothing and exits 0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """A pytest plugin that keeps the outcome of every test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test: its own run counts, and what went wrong around it."""
        if report.when == "call" or report.outcome != "passed":
            entry: dict[str, object] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.failed:
                entry["error"] = report.longreprtext.splitlines()[-1]
            elif report.skipped and isinstance(report.longrepr, tuple):
                entry["reason"] = report.longrepr[2]
            self.tests[report.nodeid] = entry


def test_files() -> list[str]:
    """The files that hold tests marked gpu. Others are not even collected: they may import what is not here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def hardware() -> dict[str, object]:
    """The device and what drives it."""
    import torch

    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(device.total_memory / 2**30, 1),
        "compute_capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def commit() -> str | None:
    """The checkout's commit; None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    """Run, record, and return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "infra" / "results" / "gpu-suite.json")
    parser.add_argument(
        "pytest_arguments", nargs="*", help="after --: further arguments for pytest, e.g. -- -k attention"
    )
    arguments = parser.parse_args()

    try:
        import torch
    except ModuleNotFoundError:
        print("gpu suite: skipped, PyTorch is not installed here")
        return 0
    if not torch.cuda.is_available():
        print("gpu suite: skipped, PyTorch sees no CUDA device here")
        return 0

    os.chdir(ROOT)
    recorder = Recorder()
    start = time.monotonic()
    # The addopts and timeout of pyproject.toml are set aside: their marks exclude gpu, and the plugin may be missing.
    options = ["-o", "addopts=--import-mode=importlib", "-m", "gpu", "-p", "no:cacheprovider", "-ra", *test_files()]
    status = int(pytest.main([*options, *arguments.pytest_arguments], plugins=[recorder]))
    outcomes = [test["outcome"] for test in recorder.tests.values()]
    result = {
        "command": "python infra/gpu_suite.py",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "seconds": round(time.monotonic() - start, 1),
        "exit_status": status,
        "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted({str(outcome) for outcome in outcomes})},
        "tests": recorder.tests,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"gpu suite: {result['outcomes']} on {result['hardware']}; written to {arguments.output}")
    return status


if __name__ == "__main__":
    sys.exit(main())
