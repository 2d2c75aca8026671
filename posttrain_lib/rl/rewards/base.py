"""What a grader is, how a run file names one, and what it may say."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain_lib.errors import ConfigError, DataError, PosttrainError
from posttrain_lib.registry import check_options, resolve

if TYPE_CHECKING:
    from posttrain_lib.schema.rollouts import Answer

#: name -> a grader's class; a run file may name another class or a plain function as module:attribute
REWARDS: dict[str, str] = {
    "code": "posttrain_lib.rl.rewards.code:Code",
    "exact": "posttrain_lib.rl.rewards.exact:Exact",
    "format": "posttrain_lib.rl.rewards.pattern:Format",
    "http": "posttrain_lib.rl.rewards.http:Http",
    "length": "posttrain_lib.rl.rewards.length:Length",
    "maths": "posttrain_lib.rl.rewards.maths:Maths",
    "model": "posttrain_lib.rl.rewards.model:RewardModel",
    "overlong": "posttrain_lib.rl.rewards.length:Overlong",
    "regex": "posttrain_lib.rl.rewards.pattern:Regex",
}
#: those that load a model or a large library to be made
_HEAVY = frozenset({"maths", "model"})


@dataclass(frozen=True)
class Verdict:
    """A grader's word: ``value``, and whether the answer is right, None where the grader does not judge that."""

    value: float
    correct: bool | None = None


#: Gives a number, or a Verdict. One that has ``grade_many`` as well (a list of answers -> as many numbers or Verdicts,
#: in order) is asked for several at once. One whose ``needs_answer`` is true (a class says it of all that it makes)
#: compares with the rows' answers: a run in which no row has one stops before it trains. A class or function whose
#: ``reads`` names options that are paths has what lies there among the run's inputs: other content is another run.
Grader = Callable[["Answer"], "float | Verdict"]


@dataclass(frozen=True)
class RewardSpec:
    """One term of the reward.

    Args:
        name: a key of ``REWARDS``, or ``module:attribute`` of a class or a plain function.
        title: how the term is called in breakdowns and counts; no two of a run are the same.
        weight: what its value is multiplied with; 0 only watches.
        options: arguments of the class; of a function, further arguments beside the answer.
        deadline_seconds: wall-clock time of one call.
        memory_gib: address space that grading may take beyond what the made grader holds; None: any.
    """

    name: str
    title: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    deadline_seconds: float = 10.0
    memory_gib: float | None = 4.0


class Cheap(ABC):
    """Base of a grader that costs less than a message to its process: it is asked for several answers at once."""

    @abstractmethod
    def __call__(self, answer: Answer) -> float | Verdict:
        """A grade of one answer."""

    def grade_many(self, answers: Sequence[Answer]) -> list[float | Verdict]:
        """One for each answer, in order."""
        return [self(answer) for answer in answers]


def make_grader(spec: RewardSpec) -> Grader:
    """The grader of a spec: its class made with the options, or its function with them filled in.

    Raises:
        ConfigError: as :func:`named_grader`; and what its class raises.
    """
    named = named_grader(spec)
    is_class = inspect.isclass(named)
    grader: Grader = named(**spec.options) if is_class else functools.partial(named, **spec.options)
    return grader


def check_grader(spec: RewardSpec) -> Any:
    """That a spec can be made, as far as it costs little: the project's own graders look at their options.

    Returns:
        The grader; where making it costs more, its class or function.

    Raises:
        ConfigError: as :func:`make_grader`; it cannot be made.
    """
    if spec.name not in REWARDS or spec.name in _HEAVY:
        return named_grader(spec)
    try:
        return make_grader(spec)
    except PosttrainError:
        raise
    except Exception as error:
        raise cannot_be_made(spec, f"{type(error).__name__}: {error}") from error


def cannot_be_made(spec: RewardSpec, said: str) -> ConfigError:
    """The error for a grader that raised while it was made, which said this."""
    return ConfigError(
        "the grader cannot be made",
        where=f"rewards: {spec.title}",
        got=said,
        expected=f"{spec.name} made with {dict(spec.options)}",
    )


def named_grader(spec: RewardSpec) -> Any:
    """The class or function that a spec names, which takes the spec's options; nothing is made.

    Raises:
        ConfigError: no such grader, or options that it does not take.
    """
    where = f"rewards: {spec.title}"
    named: Any = resolve(spec.name, REWARDS, what="reward", where=where)
    check_options(named, spec.options, what="reward", where=where, leading=0 if inspect.isclass(named) else 1)
    return named


def checked(said: object) -> Verdict:
    """What a grader gave, as a Verdict of a finite float.

    Raises:
        ValueError: anything else than a finite real number or a Verdict of one; a bool is no number.
    """
    value, correct = (said.value, said.correct) if isinstance(said, Verdict) else (said, None)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"gave a {type(value).__name__}, not a number")
    if correct is not None and not isinstance(correct, bool):
        raise ValueError(f"gave a {type(correct).__name__} for whether the answer is right")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"gave {number}, not a finite number")
    return Verdict(number, correct)


def expected_of(answer: Answer) -> str:
    """What the row says is right. DataError where it says nothing."""
    if answer.expected is None:
        raise DataError(
            "the row has no answer to compare with", fix="give its rows an 'answer', or leave the reward out"
        )
    return answer.expected
