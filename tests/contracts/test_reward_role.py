"""What the controller may rely on, whoever grades."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from posttrain_lib.rl.rewards.base import RewardSpec, Verdict, checked, make_grader
from posttrain_lib.rl.rewards.pool import GraderPool, grade_of
from posttrain_lib.rl.rewards.process import Failure
from posttrain_lib.rl.roles import RewardRole
from posttrain_lib.schema.rollouts import Answer, Grade
from tests.support.graders import answer

SPECS = [
    RewardSpec("exact", "same", weight=2.0),
    RewardSpec("tests.support.graders:length_of", "letters", weight=-0.5),
    RewardSpec("tests.support.graders:obey", "watched", weight=0.0),
]


class InProcess:
    """Grades in the caller: what the role means, without its isolation."""

    def __init__(self, specs: Sequence[RewardSpec]) -> None:
        self._specs, self._graders = specs, [make_grader(spec) for spec in specs]
        self._closed = False

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        assert not self._closed
        return [grade_of(self._specs, [self._of(grader, one) for grader in self._graders]) for one in answers]

    def _of(self, grader: Callable, one: Answer) -> Verdict | Failure:
        try:
            return checked(grader(one))
        except Exception as error:
            return Failure(f"raised {type(error).__name__}")

    def close(self) -> None:
        self._closed = True


@pytest.fixture(scope="module", params=[InProcess, GraderPool])
def role(request: pytest.FixtureRequest) -> Iterator[RewardRole]:
    made = request.param(SPECS)
    yield made
    made.close()


def test_a_grade_for_each_answer_in_order(role: RewardRole) -> None:
    answers = [answer("1" * n, "1" * (n if n % 3 else n + 1)) for n in range(1, 30)]
    grades = role.grade(answers)
    assert [grade.parts["letters"] for grade in grades] == [float(n) for n in range(1, 30)]
    assert [grade.correct for grade in grades] == [bool(n % 3) for n in range(1, 30)]
    assert [grade.reward for grade in grades] == [2.0 * bool(n % 3) - 0.5 * n for n in range(1, 30)]
    assert not any(grade.failure for grade in grades)
    assert role.grade(answers) == grades
    assert role.grade([]) == []


def test_a_failure_costs_its_answer_only(role: RewardRole) -> None:
    good, unanswered = answer("12", "12"), answer("12")
    grades = role.grade([good, unanswered, good])
    assert grades[0] == grades[2] == Grade(1.0, {"same": 1.0, "letters": 2.0, "watched": 12.0}, True)
    assert grades[1].reward is None and grades[1].correct is None
    assert grades[1].failure is not None and grades[1].failure.startswith("same: raised DataError")
    assert grades[1].parts == {"letters": 2.0, "watched": 12.0}


def test_what_weighs_nothing_fails_nothing(role: RewardRole) -> None:
    (grade,) = role.grade([answer("raise", "raise")])
    assert grade == Grade(-0.5, {"same": 1.0, "letters": 5.0}, True)


def test_no_grade_after_the_end() -> None:
    pool = GraderPool(SPECS)
    pool.grade([answer("1", "1")])
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError):
        pool.grade([answer("1", "1")])
