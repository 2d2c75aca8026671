"""Rows of another shape than their format's are told early, and what they have is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config.data import Source
from posttrain_lib.data.encoding import EncodedRow
from posttrain_lib.data.misfit import ROWS_LOOKED_AT, Misfits
from posttrain_lib.errors import DataError

BAD = {"prompt": "a", "completion": "b"}


def seen(count: int, *, raw: Any = BAD, reason: str = "no_messages", **source: Any) -> Misfits:
    misfits = Misfits([Source(name="a", path="a.jsonl", **source), Source(name="other", path="b.jsonl")])
    for number in range(count):
        misfits.see("a", EncodedRow(0, 0, number, f"a.jsonl:{number + 1}", refused=(reason, "why"), raw=raw))
    return misfits


def test_it_stops_at_the_last_row_looked_at_and_not_before() -> None:
    seen(ROWS_LOOKED_AT - 1).stop_if_hopeless("a", Path("q"))
    with pytest.raises(DataError, match=f"first {ROWS_LOOKED_AT:,} rows of source 'a' were all refused") as caught:
        seen(ROWS_LOOKED_AT).stop_if_hopeless("a", Path("q"))
    assert caught.value.fix == "the rows have prompt, completion; is format: prompt_completion meant?"
    assert (caught.value.where, caught.value.got) == ("q", "no_messages; the first: why")


@pytest.mark.parametrize("reason", ["too_long", "nothing_left", "nothing_to_train"])
def test_what_is_wrong_with_rows_and_not_with_their_format_stops_nothing(reason: str) -> None:
    seen(ROWS_LOOKED_AT, reason=reason).stop_if_hopeless("a", Path("q"))


@pytest.mark.parametrize("other", [None, ("unknown_role", "why")], ids=["a good row", "another reason"])
@pytest.mark.parametrize("first", [True, False])
def test_one_row_that_is_otherwise_keeps_it_reading(other: tuple[str, str] | None, first: bool) -> None:
    misfits = seen(0 if first else ROWS_LOOKED_AT - 1)
    misfits.see("a", EncodedRow(0, 0, 0, "a.jsonl:0", refused=other, raw=BAD))
    for number in range(ROWS_LOOKED_AT if first else 1):
        misfits.see("a", EncodedRow(0, 0, number, "a.jsonl:1", refused=("no_messages", "why"), raw=BAD))
    misfits.stop_if_hopeless("a", Path("q"))
    assert misfits.hints() == ""


@pytest.mark.parametrize(
    ("raw", "source", "said"),
    [
        ({"instruction": "a", "output": "b"}, {}, "is format: alpaca meant?"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "is format: preference meant?"),
        ({"input_ids": [1], "labels": [1]}, {}, "is format: tokens meant?"),
        ({"messages": []}, {"format": "sharegpt"}, "is format: messages meant?"),
        ({"question": "a", "answer": "b"}, {}, "format messages needs messages: say in data.sources.fields"),
        ({"messages": []}, {"fields": {"messages": "talk"}}, "format messages needs messages"),
        ({str(number): 0 for number in range(11)}, {}, "the rows have 0, 1, 2, 3, 4, 5, 6, 7 and 3 more, and"),
    ],
)
def test_the_hint_names_what_the_rows_have(raw: dict[str, Any], source: dict[str, Any], said: str) -> None:
    hints = seen(2, raw=raw, **source).hints()
    assert hints.startswith("source 'a': the rows have ") and said in hints


@pytest.mark.parametrize("raw", ["{broken", {"messages": [{"role": "robot"}]}])
def test_no_hint_where_the_fields_are_the_right_ones_or_there_are_none(raw: Any) -> None:
    assert seen(2, raw=raw).hints() == ""


def test_a_file_that_is_one_object_around_its_rows_is_told() -> None:
    wrapped = {"version": 1, "data": [{"messages": []}] * 300}
    assert seen(1, raw=wrapped).hints().endswith("one object whose 'data' is a list of 300: store that list alone")
    assert "one object" not in seen(2, raw=wrapped).hints()
