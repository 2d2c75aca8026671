"""Figures of held-out answers: a grading that failed is no score, and is counted beside the means."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain_lib.config.grpo import REWARD_FIGURES
from posttrain_lib.rl import figures
from posttrain_lib.rl.figures import (
    Busy,
    Times,
    batch_figures,
    held_out_figures,
    held_out_scores,
    held_out_value,
    measure_of,
)
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.trajectories import Group, Trajectory
from posttrain_lib.schema.rollouts import Answer, Grade

FAILED = Grade(None, {"exact": 1.0}, None, "exact: took too long")
RIGHT, WRONG = Grade(1.0, {"exact": 1.0}, True), Grade(-1.0, {"exact": 0.0}, False)


def told(grades: list[Grade], ways: int = 1) -> dict[str, dict[str, float]]:
    nothing = np.zeros(0, np.float32)
    answer = Answer(prompt=(), text="", expected=None, extra={}, tokens=0, finished=True)
    one = Trajectory(np.zeros(3, np.int32), 3, np.zeros(3, bool), nothing, nothing.astype(np.int32), answer, True)
    scores = held_out_scores(grades, ways)
    return held_out_figures(scores, measure_of(scores), grades, [one] * len(grades), ways)


def test_a_failed_grading_is_left_out_of_every_mean_and_counted() -> None:
    found = told([RIGHT, FAILED, WRONG, RIGHT])
    figures = found["held_out_figures"]
    assert found["held_out"]["all"] == pytest.approx(1 / 3)
    assert figures["pass@1"] == figures["reward/exact"] == pytest.approx(2 / 3)
    assert (figures["reward"], figures["failed"]) == (pytest.approx(1 / 3), 1.0)


def test_of_sampled_answers_the_graded_ones_count() -> None:
    # greedy, and two drawn, of three prompts
    grades = [RIGHT, RIGHT, WRONG, RIGHT, FAILED, RIGHT, WRONG, FAILED, FAILED]
    figures = told(grades, 3)["held_out_figures"]
    assert figures["sampled_pass@1"] == pytest.approx((0.5 + 1.0) / 2), "of the last prompt no drawn answer is graded"
    assert figures["sampled_pass@2"] == 1.0, "two graded ones has the first prompt alone"
    assert (figures["pass@1"], figures["failed"]) == (pytest.approx(2 / 3), 3.0)


def test_a_grader_that_weighs_nothing_and_failed_has_no_score() -> None:
    """The reward is there, of the others; its own part and whether the answer is right are not."""
    silent = Grade(0.5, {"form": 0.5})
    right, wrong = (Grade(0.5, {"form": 0.5, "exact": float(good)}, good) for good in (True, False))
    figures = told([right, silent, wrong, silent, right, silent, silent, right, silent], 3)["held_out_figures"]
    assert figures["pass@1"] == figures["reward/exact"] == 1.0, "of the three greedy answers the first is judged"
    assert (figures["reward"], figures["reward/form"], figures["failed"]) == (0.5, 0.5, 0.0)
    assert figures["sampled_pass@1"] == pytest.approx((0.0 + 1.0 + 1.0) / 3) and "sampled_pass@2" not in figures


def test_without_a_word_on_what_is_right_the_reward_counts() -> None:
    found = told([Grade(2.0), FAILED, Grade(1.0)])
    assert found["held_out"]["all"] == -1.5 and "pass@1" not in found["held_out_figures"]


def test_where_nothing_was_graded_there_is_no_value() -> None:
    found = told([FAILED, FAILED])
    assert "held_out" not in found and found["held_out_figures"]["failed"] == 2.0
    assert measure_of(held_out_scores([FAILED], 1)) is None


def test_a_run_that_is_measured_by_what_is_right_has_no_value_where_nobody_says_it() -> None:
    """The reward with its sign changed would be below every share: that look would have been the best of all."""
    silent = held_out_scores([Grade(2.0, {"form": 2.0})] * 2, 1)
    assert held_out_value(silent, measure_of(silent)) == -2.0
    assert held_out_value(silent, measure_of(held_out_scores([RIGHT, WRONG], 1))) is None


def test_the_batchs_own_figures_are_names_that_no_reward_may_have() -> None:
    answer = Answer(prompt=(), text="", expected=None, extra={}, tokens=1, finished=True)
    trained, logprobs = np.array([False, True]), np.zeros(1, np.float32)
    one = Trajectory(np.zeros(2, np.int32), 1, trained, logprobs, np.zeros(1, np.int32), answer, True)
    group = Group(0, RolloutPrompt((1,), (), None, "s", "0"), [one, one], [RIGHT, WRONG])
    told = {name for name in batch_figures([group], [np.zeros(2)], 0, {0: 0}) if name.startswith("reward/")}
    assert told - {"reward/exact"} == {f"reward/{name}" for name in REWARD_FIGURES}


class Clock:
    """Stands still until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(figures.time, "perf_counter", lambda: self.now)


def test_a_batch_has_what_was_worked_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first look at the policy, nor what the engine does while a checkpoint is written."""
    clock, engine = Clock(monkeypatch), Busy()
    times = Times()
    for _ in range(2):
        with engine.working():
            clock.now += 100.0
        times.begin(engine.seconds, 0.0)
        with engine.working():
            clock.now += 1.0
        clock.now += 3.0
        told = times.figures(engine.seconds, 0.0)
        assert (told["time/batch_seconds"], told["idle/rollout"], told["idle/reward"]) == (4.0, 0.75, 1.0)


def test_work_that_goes_on_counts_in_the_batch_that_it_was_done_in(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, grader, times = Clock(monkeypatch), Busy(), Times()
    with grader.working():
        clock.now += 1.0
        assert times.figures(0.0, grader.seconds)["idle/reward"] == 0.0
        times.begin(0.0, grader.seconds)
        clock.now += 1.0
    clock.now += 1.0
    assert times.figures(0.0, grader.seconds)["idle/reward"] == 0.5
