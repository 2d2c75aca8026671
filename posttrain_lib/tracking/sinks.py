"""What takes a run's reports, and how several of them are driven without any of them being able to stop a run.

Only the process that watches a job has sinks, never its ranks. Steps come in order and each once: a run that goes on
from a checkpoint trains some steps again, with the same result, and ``tracking.json`` of the work folder says up to
where each sink has been given them. That is written first, so that a process killed in between costs a sink one step
and never gives it one twice. A run that rolls back trains the steps behind the checkpoint on other data: those are
given again, under the same numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from posttrain_lib.schema.reports import StepReport

_CURSORS = "tracking.json"
#: how the event of a report begins with which a run has gone back to a checkpoint because a step went wrong
ROLLED_BACK = "rolled back"


@dataclass(frozen=True)
class RunFacts:
    """What a sink is told of a run. ``run_id`` is the same for every attempt at the same work."""

    name: str
    run_id: str
    config: Mapping[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Takes the figures of one run. ``repeats``: whether it wants the steps again that are trained again.

    ``open`` is told what an earlier attempt's ``open`` returned, None the first time, so that it can go on with the
    same run of its host; what it returns is kept, a JSON value. ``step`` gets reports in order. ``close`` ends it, with
    the figures of the whole run, None where the run did not come to its end.
    """

    name: str
    repeats: bool

    def open(self, facts: RunFacts, earlier: Any) -> Any:
        """Begin, or go on."""
        ...

    def step(self, report: StepReport) -> None:
        """One step's figures."""
        ...

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """No more steps."""
        ...


@dataclass
class _State:
    """Of one sink in this attempt: what it was told and how it went. ``key`` tells it from its neighbours."""

    sink: Sink
    key: str
    earlier: Any = None
    last_step: int = -1
    is_open: bool = False
    written: int = 0
    lost: int = 0
    error: str = ""


class Sinks:
    """Several sinks as one.

    A sink that raises is said aloud once, is not called again before it is closed, and what it did not get is counted:
    the run's receipt has it.

    Args:
        sinks: to be driven. facts: of the run. work: the folder where the cursors lie. say: for one line of text.
    """

    def __init__(self, sinks: Sequence[Sink], facts: RunFacts, work: Path, say: Callable[[str], None]) -> None:
        self._path, self._say, self._facts = work / _CURSORS, say, facts
        known = _read(self._path)
        self._states = []
        for number, sink in enumerate(sinks):
            key = f"{number}:{sink.name}"
            before = known.get(key, {})
            self._states.append(_State(sink, key, before.get("earlier"), before.get("last_step", -1)))
        for state in self._states:
            self._try(state, lambda state=state: self._open(state))  # type: ignore[misc]
        if any(not state.sink.repeats for state in self._states):
            self._write()

    def _open(self, state: _State) -> None:
        state.earlier = state.sink.open(self._facts, state.earlier)
        state.is_open = True

    def step(self, report: StepReport) -> None:
        """Give a report to every sink that has not had its step."""
        if report.event.startswith(ROLLED_BACK):  # what follows is other data, and another result
            for state in self._states:
                state.last_step = min(state.last_step, report.step)
        due = [state for state in self._states if state.sink.repeats or report.step > state.last_step]
        for state in due:
            state.last_step = max(state.last_step, report.step)
        if any(not state.sink.repeats for state in due):
            self._write()
        for state in due:
            if state.is_open and self._try(state, lambda state=state: state.sink.step(report)):  # type: ignore[misc]
                state.written += 1
            else:
                state.lost += 1

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Close every sink that was opened, those that failed too: what they have may still be saved."""
        for state in self._states:
            if state.is_open or state.written:
                self._try(state, lambda state=state: state.sink.close(summary))  # type: ignore[misc]
                state.is_open = False

    def receipt(self) -> list[dict[str, Any]]:
        """How each of them went: steps written and lost in this attempt, and its first error."""
        return [
            {"to": state.sink.name, "written": state.written, "lost": state.lost, "error": state.error}
            for state in self._states
        ]

    def _try(self, state: _State, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a host's client raises: training goes on, and the receipt has it
            state.is_open = False
            if not state.error:
                state.error = f"{type(error).__name__}: {error}"
                self._say(f"tracking to {state.sink.name} failed and goes no further: {state.error}")
            return False
        return True

    def _write(self) -> None:
        content = {
            state.key: {"earlier": state.earlier, "last_step": state.last_step}
            for state in self._states
            if not state.sink.repeats
        }
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, self._path)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class JsonLines:
    """One report a line, every field of it. A line cut short by a kill is passed over by :meth:`reports`."""

    name = "jsonl"
    repeats = True  # what is read back is the last of each step; and nothing may be missing

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def open(self, facts: RunFacts, earlier: Any) -> None:
        """Go on behind what is there."""
        ends_whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"", b"\n")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        if not ends_whole:
            self._file.write("\n")

    def step(self, report: StepReport) -> None:
        """Written through, so that another process sees it."""
        self._file.write(json.dumps(asdict(report)) + "\n")
        self._file.flush()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Nothing of the summary: it is in the step's manifest."""
        self._file.close()

    def reports(self) -> list[StepReport]:
        """What the file holds, by step; of a step reported twice the last."""
        found: dict[int, StepReport] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    report = StepReport(**json.loads(line))
                except ValueError:
                    continue  # the line that a killed process was writing: that step is trained and reported again
                found[report.step] = report
        return [found[step] for step in sorted(found)]
