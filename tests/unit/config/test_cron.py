"""What a scheduler would refuse at deployment is refused when the file is read."""

from __future__ import annotations

import pytest

from posttrain_lib.config.cron import check_cron


@pytest.mark.parametrize(
    "text",
    ["0 3 * * ? *", "*/15 8-18 ? * MON-FRI *", "5 0,12 1,15 jan,JUL ? 2026-2030", "0 6 L * ? *", "0 6 ? * 6#3 *",
     "0 6 ? * 6L *", "0 0 5W * ? *", "59 23 31 12 ? 2199"],
)  # fmt: skip
def test_expressions_that_a_scheduler_takes(text: str) -> None:
    assert check_cron(text) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 3 * *", "4 fields where 6 are wanted: minute, hour"),
        ("0 3 * * *", "5 fields"),
        ("0 3 * * * *", "must be [?]"),
        ("0 3 ? * ? *", "must be [?]"),
        ("60 3 * * ? *", "minute '60' is outside of 0 to 59"),
        ("0 3-24 * * ? *", "hour '3-24'"),
        ("0 3 0 * ? *", "day of month '0'"),
        ("0 3 * Janury ? *", "month 'Janury'"),
        ("0 3 ? * 8 *", "day of week '8'"),
        ("0 3 ? * 2-6 *", "day of week '2-6' is another day on AWS than on Argo: name it, as MON-FRI"),
        ("0 3 ? * MON,7 *", "day of week '7' is another day"),
        ("5W 3 * * ? *", "minute '5W' is outside of 0 to 59"),
        ("0 3L * * ? *", "hour '3L'"),
        ("0 3 1#2 * ? *", "no value, list, range or step"),
        ("0 3 32W * ? *", "day of month '32W'"),
        ("0 3 ? * 8L *", "day of week '8L'"),
        ("*/0 3 * * ? *", "no value, list, range or step"),
        ("0, 3 * * ? *", "no value, list, range or step"),
        ("? 3 * * ? *", "no value, list, range or step"),
    ],
)
def test_others_are_refused_by_field(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_cron(text)
