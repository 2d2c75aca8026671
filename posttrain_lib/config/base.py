"""The base of every section: frozen, and closed to unknown keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A config section. Unknown keys are errors; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a section: in a sentence, and the values that would mend it."""

    what: str
    fix: str


class Disagreement(ValueError):
    """Values that do not go together, all that were found at once: who mends one should not meet the next after it.

    A ValueError, so that pydantic reports it; ``config.load`` takes the fixes out of it.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.fix = "; ".join(dict.fromkeys(problem.fix for problem in problems))
        super().__init__("; besides, ".join(problem.what for problem in problems))
