"""Graders that look at a text or count its tokens, and how a run file names one."""

from __future__ import annotations

import pytest

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.registry import resolve
from posttrain_lib.rl.rewards.base import REWARDS, RewardSpec, Verdict, checked, make_grader
from posttrain_lib.rl.rewards.exact import Exact
from posttrain_lib.rl.rewards.length import Length, Overlong
from posttrain_lib.rl.rewards.pattern import Format, Regex
from posttrain_lib.schema.rollouts import Answer
from tests.support.graders import answer

RIGHT, WRONG = Verdict(1.0, True), Verdict(0.0, False)


@pytest.mark.parametrize("name", REWARDS)
def test_every_name_stands_for_a_class(name: str) -> None:
    assert isinstance(resolve(name, REWARDS, what="reward", where="rewards"), type)


def shorter(answer: Answer, than: int = 3) -> float:
    return float(len(answer.text) < than)


def test_a_function_of_ones_own() -> None:
    name = f"{__name__}:shorter"
    assert make_grader(RewardSpec(name, "s"))(answer("abc")) == 0.0
    assert make_grader(RewardSpec(name, "s", options={"than": 4}))(answer("abc")) == 1.0
    with pytest.raises(ConfigError, match="does not take these options") as caught:
        make_grader(RewardSpec(name, "s", options={"then": 4}))
    assert caught.value.fix == "did you mean 'than'?" and caught.value.expected == "than"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("math", {}, "did you mean 'maths'"),
        ("nowhere.at_all:thing", {}, "cannot be imported"),
        ("exact", {"extrakt": "whole"}, "did you mean 'extract'"),
        ("exact", {"extract": "wole"}, "did you mean 'whole'"),
        ("regex", {"pattern": "("}, "cannot be read"),
        ("regex", {"pattern": "a", "how": "somehow"}, "unknown way"),
        ("regex", {}, "does not take these options"),
        ("format", {}, "demands nothing"),
        ("format", {"sections": ["a"], "alone": True}, "there are none"),
        ("overlong", {"max_tokens": 4, "cache": 5}, "1 to 4"),
        ("length", {"per_token": 0.0}, "cost something"),
        ("code", {"seconds": 0}, "some time"),
        ("http", {"url": "file:passwords"}, "asked by http"),
    ],
)
def test_graders_that_cannot_be_made(name: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_grader(RewardSpec(name, "t", options=options))


def test_numbers_of_all_kinds_are_values() -> None:
    from fractions import Fraction

    import numpy as np

    for value in (1, 0.5, np.float32(0.5), np.int64(3), Fraction(1, 2), -0.0):
        assert checked(value) == Verdict(float(value))
    for bad in (np.bool_(True), np.array([1.0, 2.0]), b"1", object()):
        with pytest.raises(ValueError, match="not a number"):
            checked(bad)


def test_exact() -> None:
    assert Exact()(answer(" a  b\n", "a b")) == RIGHT
    assert Exact()(answer("A b", "a b")) == WRONG
    assert Exact(ignore_case=True)(answer("A b", "a B")) == RIGHT
    assert Exact(extract="gsm8k")(answer("#### 1,000", "x\n#### 1000")) == RIGHT
    assert Exact(extract="gsm8k")(answer("1000", "no marker")) == WRONG
    with pytest.raises(DataError, match="no answer to compare with"):
        Exact()(answer("a"))


def test_regex() -> None:
    assert Regex("b+")(answer("abbc")) == Verdict(1.0)
    assert Regex("b+", how="match")(answer("abbc")) == Verdict(0.0)
    assert Regex("a.*c", how="fullmatch")(answer("a\nb\nc")) == Verdict(1.0)
    choice = Regex(r"answer is (?P<answer>\w)")
    assert choice(answer("The answer is A. No, the answer is B", "B")) == RIGHT
    assert choice(answer("The answer is B. No, the answer is A", "B")) == WRONG
    assert choice(answer("B", "B")) == WRONG
    with pytest.raises(DataError):
        choice(answer("The answer is A"))


def test_format_by_tags() -> None:
    grade = Format(tags=["think", "answer"])
    assert grade(answer("<think>a</think> so <answer>b</answer>")) == 1.0
    assert grade(answer("<answer>b</answer><think>a</think>")) == pytest.approx(2 / 3)
    assert grade(answer("<think>a<answer>b</answer></think>")) == pytest.approx(2 / 3)
    assert grade(answer("<think>a</think><think>a</think><answer>b</answer>")) == pytest.approx(1 / 3)
    assert grade(answer("</think>a<think>")) == 0.0
    assert grade(answer("")) == 0.0
    alone = Format(tags=["think", "answer"], alone=True)
    assert alone(answer("<think>a</think>\n<answer>b</answer>\n")) == 1.0
    assert alone(answer("<think>a</think> so <answer>b</answer>")) == 0.75


@pytest.mark.parametrize(
    ("sections", "text", "share"),
    [
        (["Plan", "Plan B"], "Plan B", 2 / 3),
        (["Plan", "Plan B"], "Plan B\nPlan", 2 / 3),
        (["Plan", "Plan B"], "Plan\nPlan B", 1.0),
        (["Step", "Step"], "Step 1", 2 / 3),
        (["Step", "Step"], "Step 1\nStep 2", 1.0),
        (["A:", "B:"], "B: see below\nA: x\nB: y", 1.0),
    ],
)
def test_a_line_counts_for_one_section(sections: list[str], text: str, share: float) -> None:
    assert Format(sections=sections)(answer(text)) == share


def test_format_by_sections_and_end() -> None:
    grade = Format(sections=["# Plan", "# Result"], finished=True)
    assert grade(answer("# Plan\nx\n  # Result\ny")) == 1.0
    assert grade(answer("# Result\nx\n# Plan\ny", finished=False)) == 0.5
    assert grade(answer("# Plan\nx", finished=False)) == 0.25


def test_overlong_as_in_dapo() -> None:
    grade = Overlong(max_tokens=20, cache=4)
    assert [grade(answer("", tokens=n)) for n in (0, 16, 17, 18, 20, 21, 99)] == [0, 0, -0.25, -0.5, -1, -1, -1]


def test_a_price_of_tokens() -> None:
    grade = Length(per_token=0.5, free=10)
    assert [grade(answer("", tokens=n)) for n in (0, 10, 11, 14)] == [0, 0, -0.5, -2.0]
