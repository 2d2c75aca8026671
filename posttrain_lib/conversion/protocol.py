"""What an agent is, and the loop that lets one work against the gate."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain_lib.conversion.brief import Brief
from posttrain_lib.conversion.family_file import FamilyFile


@dataclass(frozen=True)
class GiveUp:
    """An agent has nothing more to propose."""

    reason: str


@dataclass(frozen=True)
class Attempt:
    """One proposal and what became of it.

    ``outcome``: "passed"; "differs" (the gate's ``report`` says where); "refused" (``error``: the text may not do that,
    or files and definition do not fit); "failed" (``error``: it raised); "timeout" and "killed" (it went beyond its
    limits).
    """

    number: int
    text: str
    note: str
    outcome: str
    seconds: float
    error: str | None = None
    report: dict[str, Any] | None = None
    isolation: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the gate has nothing against it."""
        return self.outcome == "passed"

    @property
    def summary(self) -> str:
        """One line."""
        if self.report is not None and not self.passed:
            failed = [check["name"] for check in self.report["checks"] if not check["passed"]]
            where = self.report["first_wrong_module"]
            return f"differs{'' if where is None else f', first in {where}'} ({', '.join(failed[:3])})"
        return self.outcome if self.error is None else f"{self.outcome}: {self.error.splitlines()[0][:160]}"


class Agent(Protocol):
    """Proposes family files. ``named``: it is told the family's names."""

    name: str
    named: bool

    def propose(self, brief: Brief, history: Sequence[Attempt]) -> FamilyFile | GiveUp:
        """The next proposal, after what became of the earlier ones."""
        ...


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many attempts, or when no further one may begin."""

    attempts: int = 40
    seconds: float = 3600.0


@dataclass(frozen=True)
class Outcome:
    """How the work of an agent ended. ``reason`` says why without a passing file."""

    agent: str
    attempts: tuple[Attempt, ...]
    seconds: float
    reason: str | None = None

    @property
    def passing(self) -> Attempt | None:
        """The attempt that passed."""
        return next((attempt for attempt in self.attempts if attempt.passed), None)


def work(
    agent: Agent,
    brief: Brief,
    judge: Callable[[int, FamilyFile], Attempt],
    budget: Budget,
    folder: Path,
    say: Callable[[str], None],
) -> Outcome:
    """Let an agent propose until the gate passes, it gives up or the budget ends.

    Args:
        judge: runs one proposal; gives the attempt of that number.
        folder: where each attempt is kept, as it comes: its text and its report.
    """
    begin, attempts = time.monotonic(), list[Attempt]()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "brief.json").write_text(json.dumps(brief.to_dict(), indent=1), encoding="utf-8")

    def ended(reason: str | None) -> Outcome:
        return Outcome(agent.name, tuple(attempts), time.monotonic() - begin, reason)

    while len(attempts) < budget.attempts:
        if time.monotonic() - begin > budget.seconds:
            return ended(f"the budget of {budget.seconds:g} seconds is used up")
        proposal = agent.propose(brief, attempts)
        if isinstance(proposal, GiveUp):
            return ended(f"the agent gave up: {proposal.reason}")
        attempt = judge(len(attempts) + 1, proposal)
        attempts.append(attempt)
        _keep(attempt, folder)
        say(f"attempt {attempt.number} ({attempt.seconds:.1f} s): {attempt.summary}; {attempt.note or 'no note'}")
        if attempt.passed:
            return ended(None)
    return ended(f"the budget of {budget.attempts} attempts is used up")


def _keep(attempt: Attempt, folder: Path) -> None:
    own = folder / f"{attempt.number:03d}"
    own.mkdir()
    (own / "proposal.py").write_text(attempt.text, encoding="utf-8")
    record = dataclasses.asdict(attempt)
    del record["text"]
    (own / "attempt.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
