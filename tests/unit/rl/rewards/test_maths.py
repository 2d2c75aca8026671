"""Mathematical answers: written in many ways, right or wrong, and those of a real set."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from posttrain_lib.errors import DataError
from posttrain_lib.rl.rewards.base import RewardSpec, Verdict
from posttrain_lib.rl.rewards.maths import Maths, marked_result, number_in
from posttrain_lib.rl.rewards.pool import GraderPool
from tests.support.graders import answer

RIGHT, WRONG = Verdict(1.0, True), Verdict(0.0, False)


@pytest.fixture(scope="module")
def maths() -> Maths:
    return Maths()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so it is \\boxed{18}", "18"),
        ("9*2 = 18\n#### 18", "18"),
        ("9*2 = 18\n#### $18.00", "steps 9*2=<<9*2=18>>18\n#### 18"),
        ("#### 1,250", "1250"),
        ("18", "18"),
        ("The answer is 18.", "18"),
        ("First \\boxed{3}, no: \\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{2(x+1)}", "2x+2"),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
        ("$x^2 + 2x + 1$", "$(x+1)^2$"),
        ("\\boxed{50\\%}", "50\\%"),
        ("\\boxed{50}", "50\\%"),
        ("\\boxed{\\$50}", "50"),
        ("\\boxed{-3/4}", "-0.75"),
        ("\\boxed{- 3 / 4}", "-0.75"),
        ("\\boxed{2 1/2}", "5/2"),
        ("\\boxed{-2 1/2}", "-2.5"),
        ("\\boxed{10 000}", "10000"),
        ("\\boxed{10\\,000 \\%}", "10,000"),
        ("\\boxed{7} or \\fbox{18}", "18"),
        ("7, no: the answer is 18, of 20", "18"),
    ],
)
def test_what_is_right(maths: Maths, text: str, expected: str) -> None:
    assert maths(answer(text, expected)) == RIGHT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{19}", "18"),
        ("18, no: \\boxed{19}", "18"),
        ("#### 18\nor rather \\boxed{17}", "18"),
        ("\\boxed{18} or \\boxed{19}", "18"),
        ("#### 18 or 19", "19"),
        ("", "18"),
        ("I do not know", "18"),
        ("\\boxed{}", "18"),
        ("\\boxed{18", "19"),
        ("####", "18"),
        ("\\boxed{\\frac{1}{3}}", "1/2"),
        ("\\boxed{x+1}", "x+2"),
        ("\\boxed{100000000000000000000001}", "100000000000000000000000"),
        ("\\boxed{1/0}", "1"),
        ("\\boxed{50\\%}", "0.5"),
        ("\\boxed{1 2}", "12"),
        ("1 2", "12"),
        ("\\boxed{1\\ 2}", "12"),
        ("\\boxed{2 1/2}", "21/2"),
        ("\\boxed{1, 234}", "1234"),
        ("\\boxed{" * 100, "1"),
    ],
)
def test_what_is_wrong(maths: Maths, text: str, expected: str) -> None:
    assert maths(answer(text, expected)) == WRONG


def test_only_a_marked_result_where_that_is_asked_for() -> None:
    maths = Maths(marked=True)
    assert maths(answer("It is 18", "18")) == WRONG
    assert maths(answer("#### 18", "18")) == RIGHT


@pytest.mark.parametrize("expected", [None, "", "   "])
def test_rows_without_a_result(maths: Maths, expected: str | None) -> None:
    with pytest.raises(DataError):
        maths(answer("\\boxed{x}", expected))


def test_where_a_result_stands() -> None:
    assert marked_result("a \\boxed{\\frac{1}{2}} b") == "\\frac{1}{2}"
    assert marked_result("\\boxed{ok} \\boxed{cut") == "ok"
    assert marked_result("\\boxed{\\{1\\}}") == "\\{1\\}"
    assert marked_result("#### 1\n#### 2\nbye") == "2"
    assert marked_result("nothing") is None


def test_numbers() -> None:
    assert number_in("$1,250.50") == Fraction(2501, 2)
    assert number_in("+.5") == number_in("1/2") == Fraction(1, 2)
    assert number_in("18.") == number_in("18") == 18
    for text in (
        "1,25",
        "1 or 2",
        "x",
        "",
        "1/0",
        "1e5",
        "9" * 2000,
        "--1",
        "inf",
        "1 2",
        "1 1/0",
        "1, 234",
        "\u0664\u0662x",
    ):
        assert number_in(text) is None, text


def test_a_comparison_that_never_ends_is_a_failure() -> None:
    pool = GraderPool([RewardSpec("maths", "maths", deadline_seconds=4.0)], workers=1)
    try:
        tower, good = pool.grade([answer("\\boxed{9^{9^{9^{9}}}}", "x^2+1"), answer("#### 2", "2")])
    finally:
        pool.close()
    assert tower.reward is None and good.reward == 1.0 and pool.counts.total() == 1


def test_every_reference_answer_of_gsm8k(maths: Maths, real_data: Path) -> None:
    path = real_data / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"no GSM8K at {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 1000
    for row in rows:
        solution = row["answer"]
        working, _, result = solution.rpartition("####")
        result = result.strip()
        other = str(int(result.replace(",", "")) + 1)
        assert maths(answer(solution, result)) == RIGHT == maths(answer(f"\\boxed{{{result}}}", solution)), row
        assert maths(answer(f"{working}#### {other}", solution)) == WRONG, row
        assert maths(answer(f"{working}\\boxed{{{other}}}", result)) == WRONG, row


def test_math_verify_says_of_gsm8k_what_the_fractions_say(maths: Maths, real_data: Path) -> None:
    path = real_data / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"no GSM8K at {path}")
    for line in path.read_text(encoding="utf-8").splitlines()[:60]:
        result = json.loads(line)["answer"].rpartition("####")[2].strip()
        # A formula, which only the library reads.
        formula = f"\\frac{{2 \\cdot {result.replace(',', '')}}}{{2}}"
        assert maths(answer(f"\\boxed{{{formula}}}", result)) == RIGHT, result
        assert maths(answer(f"\\boxed{{{formula} + 1}}", result)) == WRONG, result
