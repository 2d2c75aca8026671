"""What a pass leaves out, and that it comes back."""

from __future__ import annotations

from posttrain_lib.rl.curriculum import Curriculum
from posttrain_lib.schema.rollouts import Grade


def graded(*right: bool | None) -> list[Grade]:
    return [Grade(float(bool(one)), correct=one) for one in right]


def test_what_was_solved_is_left_out_once() -> None:
    curriculum = Curriculum(0.75, None)
    curriculum.note(0, graded(True, True, True, False))
    curriculum.note(1, graded(True, True, False, False))
    assert curriculum.skips(0, 10) == "75% right at its last visit" and curriculum.skips(1, 10) is None
    assert curriculum.skips(0, 10) is None, "it comes back"


def test_what_is_hopeless_is_left_out() -> None:
    curriculum = Curriculum(None, 0.0)
    curriculum.note(3, graded(False, False))
    assert curriculum.skips(3, 10) == "only 0% right at its last visit"


def test_without_a_word_on_what_is_right_nothing_is_left_out() -> None:
    curriculum = Curriculum(0.1, 0.0)
    curriculum.note(0, graded(None, None))
    assert curriculum.skips(0, 10) is None


def test_a_run_that_has_solved_everything_goes_on() -> None:
    curriculum = Curriculum(0.5, None)
    for prompt in range(4):
        curriculum.note(prompt, graded(True))
    asked = [curriculum.skips(number, 3) is None for number in range(4)]
    assert asked == [False, False, False, True]


def test_rates_survive_a_checkpoint() -> None:
    curriculum, again = Curriculum(1.0, None), Curriculum(1.0, None)
    curriculum.note(7, graded(True))
    again.load_state([list(pair) for pair in curriculum.state()])
    assert again.rates == {7: 1.0} and again.skips(7, 9) is not None
