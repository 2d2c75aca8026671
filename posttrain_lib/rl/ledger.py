"""What became of every prompt that was asked: part of the checkpoint, so that none is lost and none counts twice.

    visit --issue--> in flight --settle--> trained | dropped | quarantined
      |                 ^                          (in flight at a kill: issued again, first)
      '--> skipped      '------ resume ------'

A *visit* is one asking of a prompt (``rl.prompts.PromptOrder``). The state is small: visits below ``next`` that are not
in flight are settled. What each one became stands in a log beside the run, a line for each update, whose lines behind a
checkpoint are cut off when the run goes on from it. A run that goes on where there is no log, its checkpoints being in
an object store and the machine another one, begins it with a line that counts the visits before (``before``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from posttrain_lib.errors import CheckpointError
from posttrain_lib.rl.version_log import VersionLog

Fate = Literal["trained", "dropped", "quarantined", "skipped"]
FATES: tuple[Fate, ...] = ("trained", "dropped", "quarantined", "skipped")
LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Settled:
    """One visit's end: which prompt it asked, by name, and why it was not trained on."""

    visit: int
    prompt: str
    fate: Fate
    reason: str = ""


class Ledger:
    """Issues visits and keeps account of them.

    Args:
        log: the file of settled visits; None: none is written.
    """

    def __init__(self, log: VersionLog | None = None) -> None:
        self.log = log
        self.next = 0
        self.in_flight: set[int] = set()
        self.counts: dict[Fate, int] = dict.fromkeys(FATES, 0)
        self._again: list[int] = []
        self._unwritten: list[Settled] = []

    def issue(self, count: int, skip: Callable[[int], Settled | None] = lambda visit: None) -> list[int]:
        """So many visits, now in flight: first those that a kill interrupted, in order.

        Args:
            skip: of a fresh visit, why it is not to be asked; it is then settled as that says.
        """
        visits, self._again = self._again[:count], self._again[count:]
        while len(visits) < count:
            visit, self.next = self.next, self.next + 1
            if (skipped := skip(visit)) is None:
                visits.append(visit)
            else:
                self._count(skipped)
        self.in_flight.update(visits)
        return visits

    def settle(self, settled: Iterable[Settled]) -> None:
        """Visits in flight came to their end.

        Raises:
            ValueError: one that is not in flight: it would count twice.
        """
        for one in settled:
            if one.visit not in self.in_flight:
                raise ValueError(f"visit {one.visit} is {one.fate} and was not in flight")
            self.in_flight.remove(one.visit)
            self._count(one)

    def close_update(self, version: int) -> None:
        """Write the line of the update that made ``version``: what was settled since the line before, if anything."""
        if self.log is not None and self._unwritten:
            line: dict[str, Any] = {"version": version}
            for fate in FATES:
                line[fate] = [
                    [one.visit, one.prompt, *([one.reason] if one.reason else [])]
                    for one in self._unwritten
                    if one.fate == fate
                ]
            self.log.append([line])
        self._unwritten = []

    def state(self) -> dict[str, Any]:
        """JSON-ready, for a checkpoint, with which the log is on the disk; of a moment after :meth:`close_update`."""
        if self._unwritten:
            raise ValueError("visits were settled that no update's line has: a checkpoint would lose them")
        if self.log is not None:
            self.log.flush()
        waiting = sorted([*self.in_flight, *self._again])
        return {"next": self.next, "in_flight": waiting, "counts": dict(self.counts)}

    def begin(self) -> None:
        """A run begins: what an earlier attempt, of which no checkpoint is left, wrote into the log goes."""
        if self.log is not None:
            self.log.start(0)

    def load_state(self, state: dict[str, Any], version: int) -> str:
        """Go on from a checkpoint of ``version``: what was in flight is issued again, and lines of later updates go.

        Returns:
            What is to be said of it; empty: nothing.

        Raises:
            CheckpointError: the log lacks lines that the checkpoint counts on.
        """
        self.next, self._again = int(state["next"]), list(state["in_flight"])
        self.in_flight, self._unwritten = set(), []
        self.counts = {fate: int(state["counts"][fate]) for fate in FATES}
        if self.log is None:
            return ""
        settled = sum(self.counts.values())
        if settled and not self.log.path.exists():
            self.log.replace([{"version": version, "before": dict(self.counts), **{fate: [] for fate in FATES}}])
            return f"{self.log.path.name} is not here: it begins anew, and only counts the {settled:,} prompts before"
        lines = self.log.start(version)
        known = sum(len(line[fate]) + line.get("before", {}).get(fate, 0) for line in lines for fate in FATES)
        if known != settled:
            raise CheckpointError(
                "the ledger's log and the checkpoint tell of different visits",
                where=self.log.path,
                got=f"{known} settled visits up to version {version}",
                expected=f"{settled}",
                fix="the log was changed: bring it back from a copy; without the file the run goes on from its counts",
            )
        return ""

    def _count(self, one: Settled) -> None:
        self.counts[one.fate] += 1
        self._unwritten.append(one)
