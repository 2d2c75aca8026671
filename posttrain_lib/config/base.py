"""The base of every section: frozen, and closed to unknown keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class TaggedSection(BaseModel):
    """A config section that one field's value tells from its like. Unknown keys are errors; values cannot change after
    loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Section(TaggedSection):
    """A config section, in which besides a flag is no number: YAML reads yes and on as flags, and Python counts true as
    1. (Of a tagged one pydantic lets nothing look at the values before it.)"""

    @field_validator("*", mode="before")
    @classmethod
    def _no_flags(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds_in(cls.model_fields[str(info.field_name)].annotation)
        if kinds & {int, float} and not kinds & {bool, Any} and _holds_flag(value):
            fix = "give the number, or leave the field out for its default"
            raise Disagreement([Problem("true and false are no values of this field", fix)])
        return value


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


def _kinds_in(annotation: Any) -> set[Any]:
    """The types that stand anywhere in an annotation."""
    return {annotation}.union(*map(_kinds_in, get_args(annotation)))


def _holds_flag(value: Any) -> bool:
    return any(map(_holds_flag, value)) if isinstance(value, list | tuple) else isinstance(value, bool)
