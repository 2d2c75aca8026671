"""The agent that needs no model and no network: it guesses from names and shapes, and lets the gate correct it.

The first proposal takes the likeliest reading of everything. Where the gate says which module is wrong first, only the
choices that show there are changed, one at a time, then in pairs and in threes. A change that lets the comparison get
further, or brings the wrong module nearer, is kept. It sees the brief and the gate's reports, and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from posttrain_lib.conversion.brief import Brief
from posttrain_lib.conversion.family_file import FamilyFile
from posttrain_lib.conversion.protocol import Attempt, GiveUp
from posttrain_lib.conversion.search_space import Choice, NotRepresentableError, Space, differs_in_float32
from posttrain_lib.conversion.search_writer import FamilyWriter

#: how many choices are changed at once at most
_CHANGES = 3
#: of the suspects, so many take part
_SUSPECTS = 8
#: a wrong module must come nearer by this factor for the change to be kept
_NEARER = 2.0

Picks = tuple[tuple[str, int], ...]
#: further is larger: (how far the comparison got, which module, how near it is)
Score = tuple[int, int, float]


class SearchAgent:
    """Coordinate search over the options of the blocks. One object is for one conversion."""

    name = "search"
    named = False

    def __init__(self) -> None:
        self._space: Space | None = None
        self._proposed: list[Picks] = []
        self._best: tuple[Score, Picks] | None = None
        self._turn: Iterator[tuple[Picks, str]] = iter(())

    def propose(self, brief: Brief, history: Sequence[Attempt]) -> FamilyFile | GiveUp:
        """The next definition to try."""
        if self._space is None:
            try:
                self._space = self.space_of(brief)
            except NotRepresentableError as error:
                return GiveUp(str(error))
            return self._file(tuple(self._space.first().items()), "the likeliest reading of every field and name")
        self._learn(history[-1])
        for picks, note in self._turn:
            if picks not in self._proposed and self._space.has_place_for(dict(picks)):
                return self._file(picks, note)
        return GiveUp("every combination near the best definition has been tried")

    def space_of(self, brief: Brief) -> Space:
        """What there is to choose from, in which order. A study of the search may order it otherwise."""
        return Space.of(brief)

    def _file(self, picks: Picks, note: str) -> FamilyFile:
        assert self._space is not None
        self._proposed.append(picks)
        return FamilyFile(FamilyWriter(self._space, dict(picks)).text(), note)

    def _learn(self, attempt: Attempt) -> None:
        """Go on from the last proposal if it got further than the best one."""
        assert self._space is not None
        score, picks = score_of(attempt), self._proposed[-1]
        if self._best is None or score > (*self._best[0][:2], self._best[0][2] * _NEARER):
            self._best = score, picks
            report = attempt.report or {"checks": [], "first_wrong_module": None}
            self._turn = self._changes(dict(picks), report)

    def _changes(self, picks: dict[str, int], report: Mapping[str, Any]) -> Iterator[tuple[Picks, str]]:
        """Neighbours of a definition: first what may mend that which the report complains of, alone and together; then
        the rest."""
        assert self._space is not None
        suspects, others = self._space.suspects(report)
        groups: list[Iterable[tuple[Choice, ...]]] = [
            *(itertools.combinations(suspects[:_SUSPECTS], count) for count in range(1, _CHANGES + 1)),
            itertools.combinations(others, 1),
            itertools.product(suspects, others),
        ]
        for together in itertools.chain(*groups):
            rest = [[n for n in range(len(c.values)) if n != picks[c.name]] for c in together]
            for values in itertools.product(*rest):
                changed = {**picks, **{c.name: n for c, n in zip(together, values, strict=True)}}
                yield tuple(changed.items()), _said(together, values)


def _said(choices: tuple[Choice, ...], values: tuple[int, ...]) -> str:
    return "; ".join(f"{c.name}: {c.values[n].code or 'the usual'}" for c, n in zip(choices, values, strict=True))


def score_of(attempt: Attempt) -> Score:
    """How far the comparison got: no report, a wrong module, or only checks that failed."""
    report = attempt.report
    if report is None:
        return (-1, 0, 0.0)
    modules = report["modules"]
    if modules and differs_in_float32(report):
        off, limit = float(modules[-1]["difference"]), float(modules[-1]["limit"])
        near = limit / off if 0 < off < math.inf else 0.0
        return (0, len(modules), near)
    return (1, sum(check["passed"] for check in report["checks"]), 0.0)
