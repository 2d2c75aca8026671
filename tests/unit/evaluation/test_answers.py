"""Answers found in texts."""

from __future__ import annotations

import pytest

from posttrain_lib.errors import ConfigError
from posttrain_lib.evaluation.answers import behind_four_hashes, extractor, last_number, majority_baseline, matches


@pytest.mark.parametrize(
    ("text", "hashes", "last"),
    [
        ("2 + 2 = <<2+2=4>>4\n#### 4", "4", "4"),
        ("so #### $1,250.00 in all", "1250", "1250"),
        ("#### 3\n#### -0.50", "-0.5", "-0.5"),
        ("the answer is 007.", None, "7"),
        ("#### none", None, None),
        ("#### -0", "0", "0"),
        ("#### 100", "100", "100"),
        ("no number", None, None),
        ("either of 2,3", None, "3"),
        ("#### 1,2345", "1", "2345"),
        ("#### -1,250,000.50", "-1250000.5", "-1250000.5"),
        ("that is 10-5", None, "5"),
        ("x = (2)-5, or rather -5", None, "-5"),
        ("it is \u22127", None, "-7"),
        ("that is 10\u22125", None, "5"),
        ("#### 1.5e3", "1500", "1500"),
        ("#### -2.50E-2", "-0.025", "-0.025"),
        ("3e or 4e123", None, "123"),
    ],
)
def test_numbers(text: str, hashes: str | None, last: str | None) -> None:
    assert behind_four_hashes(text) == hashes
    assert last_number(text) == last


def test_a_text_without_an_answer_matches_nothing() -> None:
    assert matches("#### 18", "18 - 0\n#### 18.0", behind_four_hashes)
    assert not matches("18", "#### 18", behind_four_hashes)
    assert not matches("none", "none", last_number)


def test_the_majority_goes_by_what_is_found() -> None:
    assert majority_baseline(["#### 4", "#### 4.0", "#### 5", "none"], behind_four_hashes) == ("4", 0.5)


def test_a_misspelt_way_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        extractor("gsm8")
    assert extractor("posttrain_lib.evaluation.answers:last_number") is last_number
