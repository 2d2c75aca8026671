"""A process that trains a tiny job through the one launch interface, so that a test can start, signal and kill it.

    python -m tests.support.launched <folder> <compute section as JSON> <train section as JSON>

also under torchrun. Prints a line for each report, ``<step> <loss as hex float> <event>``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain_lib.compute.launch import launch, under_torchrun
from posttrain_lib.compute.processes import descendants, started_at
from posttrain_lib.config.compute import ComputeConfig
from steps.pipeline import plain_errors

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path, compute: dict[str, Any], train: dict[str, Any], *, torchrun: Sequence[str] = ()) -> list[str]:
    """To start the process with; ``torchrun``: its options, to start it under torchrun."""
    program = [sys.executable, "-m"]
    if torchrun:
        program += ["torch.distributed.run", *torchrun, "-m"]
    return [*program, "tests.support.launched", str(folder), json.dumps(compute), json.dumps(train)]


def start(arguments: list[str], output: Path | None = None) -> subprocess.Popen[str]:
    """Start it in a session of its own; stdout and stderr together to ``output``, else stdout is a pipe."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if output is None:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    with open(output, "w") as log:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )


def wait_for(condition: Any, seconds: float, what: str) -> None:
    """Until ``condition()`` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


class Family:
    """The processes below a process, as they were when this was made; process ids may come round again."""

    def __init__(self, root: int) -> None:
        self._started = {pid: started_at(pid) for pid in [root, *descendants(root)]}

    def alive(self) -> list[int]:
        """Those of them that still run."""
        return [pid for pid, at in self._started.items() if at is not None and started_at(pid) == at]


def main() -> None:
    """See the module's text."""
    folder, compute, train = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])

    def body() -> None:
        from tests.oracles.tiny_job import make_job, tiny_config

        with plain_errors():
            job = make_job(folder, tiny_config(**train))
            for report in launch(job, ComputeConfig(**{"device": "cpu", **compute})):
                loss = "-" if report.loss is None else float(report.loss).hex()
                print(report.step, loss, report.event, flush=True)

    if under_torchrun():
        from posttrain_lib.compute import torchrun

        torchrun.run(body)
    else:
        body()


if __name__ == "__main__":
    main()
