"""Correctness checks and measurements on a GPU, in one command and within a budget:

    python infra/gpu_suite.py --budget 280

runs the tests marked ``gpu``, then the parts of ``tests/benchmarks/gpu``, each in a process of its own and in the order
of their importance, and writes ``gpu-suite.json`` (rewritten after every part) and ``gpu-suite.log`` to ``--output``.
A part that fails, hangs or runs out of its share of the budget is recorded as such and the next one begins; what a part
leaves of its share goes to those after it. A table of the results comes last.

For a bare machine: Python 3.11 or newer, PyTorch, numpy, safetensors and pytest, and transformers for the peers; no
Ray, vLLM, verl or Metaflow, no network and no install. With pydantic the training loop of every recipe runs too.
Without a CUDA device everything runs on the CPU at small sizes, to show that it runs; the tests are then collected
only, and nothing is written unless ``--output`` names a folder.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "gpu"
#: part -> its share of the budget, in the order in which they run
PARTS = {
    "tests": 150,
    "ceilings": 8,
    "head": 35,
    "push": 30,
    "decode": 50,
    "step": 120,
    "attention": 55,
    "kernels": 40,
    "vocabulary": 20,
}
#: seconds that a part may go on beyond its share: a case that has begun, and the process's start
GRACE = 25
#: seconds that are kept for the table
LAST = 3
VERSIONS = ("torch", "triton", "transformers", "numpy", "safetensors", "pytest", "liger-kernel", "cut-cross-entropy")


class Recorder:
    """A pytest plugin that keeps the outcome of every test; ``lines``: a file that gets each at once."""

    def __init__(self, lines: Path | None = None) -> None:
        self.tests: dict[str, dict[str, object]] = {}
        self.lines = lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test: its own run counts, and what went wrong around it."""
        if report.when == "call" or report.outcome != "passed":
            entry: dict[str, object] = {"outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)  # what a failed collection lacks
                said = [] if crash is None else crash.message.splitlines()[:2]
                entry["error"] = " ".join([*said, report.longreprtext.splitlines()[-1]])[:400]
            elif report.skipped and isinstance(report.longrepr, tuple):
                entry["reason"] = report.longrepr[2]
            self.tests[report.nodeid] = entry
            if self.lines is not None:
                with self.lines.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"case": report.nodeid, **entry}) + "\n")


def test_files() -> list[str]:
    """The files that hold tests marked gpu. Others are not even collected: they may import what is not here.

    Those of attention come last: FlexAttention compiles for longer than the others run.
    """
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py") if _is_marked(path)]
    return [str(path) for path in sorted(files, key=lambda path: ("attention" in path.name, str(path)))]


def _is_marked(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8")


def run_tests(record: Path, arguments: list[str]) -> int:
    """Pytest in this process; its exit status."""
    import torch

    os.chdir(ROOT)
    # The addopts and timeout of pyproject.toml are set aside: their marks exclude gpu, and the plugin may be missing.
    options = ["-o", "addopts=--import-mode=importlib", "-m", "gpu", "-p", "no:cacheprovider", "-ra", *test_files()]
    if not torch.cuda.is_available():
        options.append("--collect-only")
    return int(pytest.main([*options, *arguments], plugins=[Recorder(record)]))


def hardware() -> dict[str, object]:
    """The device and what drives it."""
    import torch

    facts: dict[str, object] = {"gpu": None, "cores": os.cpu_count(), "python": platform.python_version()}
    if not torch.cuda.is_available():
        return facts
    device = torch.cuda.get_device_properties(0)
    return facts | {
        "gpu": device.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(device.total_memory / 2**30, 1),
        "compute_capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Of the packages that are here."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # each but PyTorch is optional; an absent one is not listed
    return found


def commit() -> str | None:
    """The checkout's commit; None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def source_digest() -> str:
    """SHA-256 over the library's and the suite's files: what ran, also where there is no git."""
    digest = hashlib.sha256()
    for folder in ("posttrain_lib", "tests/benchmarks/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def command_of(part: str, device: str, seconds: float, record: Path) -> list[str]:
    """How a part is started; the tests have no time of their own to keep."""
    if part == "tests":
        return [sys.executable, str(Path(__file__).resolve()), "--tests-into", str(record)]
    options = ["--device", device, "--seconds", f"{seconds:.0f}", "--record", str(record)]
    return [sys.executable, "-m", f"tests.benchmarks.gpu.{part}", *options]


def run_part(part: str, device: str, seconds: float, limit: float, folder: Path) -> dict[str, Any]:
    """One part in its process: its cases as far as it got, and how it ended."""
    record, log = folder / f"{part}.jsonl", folder / "gpu-suite.log"
    record.unlink(missing_ok=True)
    begun = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        output.write(f"\n===== {part}: {seconds:.0f} s, at most {limit:.0f} s\n")
        output.flush()
        child = subprocess.Popen(
            command_of(part, device, seconds, record),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            status: int | str = child.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            # the whole session: the compiler has processes of its own
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = "out of time"
    result: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - begun, 1), "cases": _read(record)}
    record.unlink(missing_ok=True)
    if status != 0:
        result["log"] = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    return result


def _read(record: Path) -> dict[str, Any]:
    """The finished cases; a line that a killed process left half written is not one."""
    cases: dict[str, Any] = {}
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        cases[entry.pop("case")] = entry
    return cases


def is_good(name: str, part: dict[str, Any]) -> bool:
    """Whether a part ended well and none of its cases failed; what was skipped for lack of time did not."""
    if name == "tests":
        return part["status"] == 0
    return part["status"] == 0 and not any("error" in case for case in part["cases"].values())


def run_all(names: list[str], device: str, budget: float, folder: Path) -> dict[str, Any]:
    """Run parts one after another and write the result after each."""
    end = time.monotonic() + budget - LAST
    result: dict[str, Any] = {
        "command": shlex.join(["python", "infra/gpu_suite.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "source_sha256": source_digest(),
        "hardware": hardware(),
        "versions": versions(),
        "budget_seconds": budget,
        "parts": {},
    }
    for number, name in enumerate(names):
        left = end - time.monotonic()
        if left < 5:
            result["parts"][name] = {"status": "no time left", "seconds": 0.0, "cases": {}}
            continue
        share = left * PARTS[name] / sum(PARTS[other] for other in names[number:])
        print(f"gpu suite: {name}, {share:.0f} s", flush=True)
        result["parts"][name] = run_part(name, device, share, min(share + GRACE, left), folder)
        text = json.dumps(result, indent=1) + "\n"
        (folder / "gpu-suite.json").write_text(text, encoding="utf-8")
    return result


def main() -> int:
    """Command line; 0 if every test passed and every part ran well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=280.0, help="seconds for everything")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, in this order")
    parser.add_argument("--output", type=Path, help="folder for gpu-suite.json and gpu-suite.log")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--tests-into", type=Path, help=argparse.SUPPRESS)  # how the part "tests" is started
    parser.add_argument("pytest_arguments", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tests_into is not None:
        return run_tests(arguments.tests_into, arguments.pytest_arguments)
    names = arguments.parts.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")

    import tempfile

    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or (RESULTS if device == "cuda" else Path(scratch))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu-suite.log").unlink(missing_ok=True)
        result = run_all(names, device, arguments.budget, folder)
        sys.path.insert(0, str(ROOT))
        from tests.benchmarks.gpu.table import lines

        print("\n".join(lines(result)))
        print(f"on {result['hardware']}" + (f"; written to {folder}" if str(folder) != scratch else ""))
    bad = [name for name, part in result["parts"].items() if not is_good(name, part)]
    if bad:
        print(f"not all went well in: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
