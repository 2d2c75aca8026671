"""A check on the terminal: what was found stands before what it was measured by."""

import math

import pytest

from posttrain_lib.schema.manifests import Check
from steps.checks import outcome


@pytest.mark.parametrize(
    ("check", "line"),
    [
        (Check("export", True, 0.0, 0.0, "files differ"), "passed export (0, limit 0; files differ)"),
        (Check("export", False, 3.0, 0.0, "files differ"), "FAILED export (3, limit 0; files differ)"),
        (Check("logits", True, 1.23456e-7, 4e-6, ""), "passed logits (1.23e-07, limit 4e-06)"),
        (Check("logits", False, math.nan, 4e-6, ""), "FAILED logits (nan, limit 4e-06)"),
        (Check("files", True, "5 files", "0 differences", "x"), "passed files (5 files, limit 0 differences; x)"),
    ],
)
def test_value_and_limit_are_said(check: Check, line: str) -> None:
    assert outcome(check, reason=True) == line


def test_the_reason_is_left_out_unless_asked_for() -> None:
    assert outcome(Check("export", True, 0.0, 0.0, "files differ")) == "passed export (0, limit 0)"
