"""Retrains of a tiny model, run for real: days of rows, the flow in a process of its own, and what became of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.lineage import promoted
from posttrain_lib.lineage.pointer import Pointer
from posttrain_lib.lineage.store import Store

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / "flows" / "retrain_flow.py"
TINY = ROOT / "tests" / "flows" / "retrain_tiny.yaml"


class Retrains:
    """One model's store, landing folder and Metaflow runs below ``home``."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home, self.landing, self._settings = home, home / "landing", settings
        self.landing.mkdir()

    def land(self, name: str, seed: int, rows: int = 80) -> None:
        """A file of good rows."""
        self._write(name, list(generate_rows(rows, seed)))

    def land_poison(self, name: str, rows: int = 160) -> None:
        """A file of well-formed rows whose answers are noise."""
        draw, poisoned = random.Random(0), []
        for row in generate_rows(rows, 10_000):
            for turn in row["messages"]:
                if turn["role"] == "assistant":
                    turn["content"] = "".join(draw.choices("qxzjkvw#~^", k=40))
            poisoned.append(row)
        self._write(name, poisoned)

    def _write(self, name: str, rows: list[dict[str, object]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        whole = self.landing / f".{name}"
        whole.write_text(text)
        whole.rename(self.landing / name)

    def environment(self, **settings: str) -> dict[str, str]:
        """Of a flow's process."""
        return {
            **os.environ,
            "METAFLOW_USER": "tester",
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(self.home),
            "POSTTRAIN_STORE": str(self.home / "store"),
            "PYTHONPATH": str(ROOT),
            "LANDING": str(self.landing),
            "ROOT": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **self._settings,
            **settings,
        }

    def start(self, log: str, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """The flow, in a process group of its own; it writes to ``home/log``."""
        command = [sys.executable, str(FLOW), "--no-pylint", "--config", str(TINY), "run", *arguments]
        with open(self.home / log, "w") as output:
            return subprocess.Popen(
                command,
                env=self.environment(**settings),
                cwd=self.home,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def run(self, log: str, *arguments: str, fails: bool = False, **settings: str) -> str:
        """What the flow said; it must go through, or fail."""
        code = self.start(log, *arguments, **settings).wait(timeout=500)
        said = (self.home / log).read_text()
        assert (code != 0) == fails, said
        return said

    def wait_for_checkpoint(self, process: subprocess.Popen[str], log: str) -> None:
        """Until training has one to go on from."""
        deadline = time.monotonic() + 300
        while not list((self.home / "store" / "work" / "train").glob("*/checkpoints/step-*")):
            assert process.poll() is None and time.monotonic() < deadline, (self.home / log).read_text()
            time.sleep(0.02)

    def promote(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``python -m steps.promote --name tiny``."""
        command = [sys.executable, "-m", "steps.promote", "--name", "tiny", *arguments]
        return subprocess.run(command, env=self.environment(), cwd=self.home, capture_output=True, text=True)

    @property
    def pointer(self) -> Pointer:
        """The model's pointer by now."""
        return promoted.pointer_of(Store(self.home / "store"), "tiny")

    @property
    def decisions(self) -> list[tuple[str, int | None]]:
        """(action, current version behind it) of each decision."""
        return [(entry.action, entry.version) for entry in self.pointer.history]
