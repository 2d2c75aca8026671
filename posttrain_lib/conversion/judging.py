"""Asking the judge: one process for all attempts of a conversion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain_lib.conversion.spec_data import FamilyData, to_data
from posttrain_lib.errors import VerificationError

#: address space of torch and transformers before a model is there
_LIBRARIES_BYTES = 2 << 30


@dataclass(frozen=True)
class Verdict:
    """``report`` is the gate's (``VerificationReport.to_dict``), or ``error`` says why there is none. ``outcome``:
    "passed", "differs", "refused" (files and definition do not fit), "failed", "timeout", "killed"."""

    outcome: str
    seconds: float
    report: dict[str, Any] | None = None
    error: str | None = None


class Judge:
    """The judging process, as a context manager.

    Args:
        seconds: for one verification.
        memory_gib: for one verification; None: what the gate finds free.
        tier: of the gate.
    """

    def __init__(self, *, seconds: float = 600.0, memory_gib: float | None = None, tier: str = "light") -> None:
        self._seconds, self._tier = seconds, tier
        self._memory = None if memory_gib is None else int(memory_gib * 2**30)

    def __enter__(self) -> Judge:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "posttrain_lib.conversion.judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The forked children are in the same group.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def verify(self, folder: Path, family: FamilyData) -> Verdict:
        """Run the gate on a folder with what a proposal said of its config.json."""
        begin = time.monotonic()
        answer = self._ask(
            task="verify",
            folder=str(folder),
            family=to_data(family),
            tier=self._tier,
            memory_limit_bytes=self._memory,
            data_bytes=None if self._memory is None else self._memory + _LIBRARIES_BYTES,
        )
        seconds = time.monotonic() - begin
        if (report := answer.get("report")) is not None:
            return Verdict("passed" if report["passed"] else "differs", seconds, report)
        outcome, error = next(iter(answer.items()))
        return Verdict("failed" if outcome == "error" else outcome, seconds, error=error)

    def facts(self, folder: Path) -> dict[str, Any]:
        """What transformers makes of a folder's fields (see ``reference_facts``)."""
        return self._told(self._ask(task="facts", folder=str(folder)), folder)["facts"]

    def write_twin(self, config: Mapping[str, Any], folder: Path) -> None:
        """Write a small model of an architecture, with random weights, by transformers."""
        self._told(self._ask(task="twin", config=dict(config), folder=str(folder)), folder)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"seconds": self._seconds, **request}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise VerificationError(
                "the judging process ended",
                got=f"exit status {self._process.wait()}",
                fix="run python -m posttrain_lib.conversion.judge by hand and see what it says",
            )
        return json.loads(line)

    def _told(self, answer: dict[str, Any], folder: Path) -> dict[str, Any]:
        for name in ("refused", "error", "timeout", "killed"):
            if name in answer:
                raise VerificationError(
                    "transformers cannot be asked about the model",
                    where=folder,
                    got=answer[name],
                    fix="check that transformers itself loads the folder",
                )
        return answer
