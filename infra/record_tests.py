"""Run the plain and the slow suite, real data included, and record what ran, where and when:

    ./infra/env python infra/record_tests.py

Writes ``infra/results/test-suites.json``: commit, hardware, and for each suite its outcomes, its time, and every skip
and failure with the reason. Takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from gpu_suite import ROOT, Recorder, commit

SUITES = {"plain": "not slow and not gpu", "slow": "slow and not gpu"}


def cpu_name() -> str:
    """The processor, as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def run_suite(marks: str, paths: list[str]) -> dict[str, object]:
    """One suite in this process, or the part of it below ``paths``."""
    recorder, start = Recorder(), time.monotonic()
    options = ["-o", "addopts=--import-mode=importlib --strict-markers", "-q", "-m", marks, *paths]
    status = int(pytest.main(options, plugins=[recorder]))
    told = {
        name: str(test.get("reason") or test.get("error") or "").replace(tempfile.gettempdir(), "$TMPDIR")
        for name, test in recorder.tests.items()
        if test["outcome"] != "passed"
    }
    return {
        "marks": marks,
        "paths": paths or ["tests"],
        "exit_status": status,
        "outcomes": dict(Counter(str(test["outcome"]) for test in recorder.tests.values())),
        "seconds": round(time.monotonic() - start),
        "not_passed": told,
    }


def record(name: str, output: Path, paths: list[str]) -> int:
    """Run one suite and write it into the result file."""
    suite = run_suite(SUITES[name], paths)
    known = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"suites": {}}
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    suite |= {
        "commit": commit(),
        "uncommitted_changes": bool(changed.stdout.strip()),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "real_data": bool(os.environ.get("POSTTRAIN_DATA")) or (ROOT.parent / "shared" / "data").is_dir(),
    }
    # A part does not take the place of the whole; the whole takes that of its parts.
    kept = {key: each for key, each in known["suites"].items() if paths or key.split()[0] != name}
    suites = {**kept, " ".join([name, *paths]): suite}
    content = {"command": "./infra/env python infra/record_tests.py", "suites": suites}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {suite['outcomes']} in {suite['seconds']} s; written to {output.relative_to(ROOT)}")
    return int(str(suite["exit_status"]))


def main() -> int:
    """Each suite in a process of its own: pytest keeps state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=sorted(SUITES), help="only this one")
    parser.add_argument("--output", type=Path, default=ROOT / "infra" / "results" / "test-suites.json")
    parser.add_argument("paths", nargs="*", help="with --suite: only the tests below these")
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.suite:
        return record(options.suite, options.output, options.paths)
    command = [sys.executable, __file__, "--output", str(options.output), "--suite"]
    return max(subprocess.run([*command, name], check=False).returncode for name in SUITES)


if __name__ == "__main__":
    sys.exit(main())
