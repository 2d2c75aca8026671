"""Plain text, and rows that come as token ids."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import numpy as np
import pytest

from posttrain_lib.data.formats import get_format
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import PlainText, TokenRow


def text(row: dict[str, Any], **fields: str) -> PlainText:
    found = get_format("text")(row, "source", "row:1", "group", fields)
    assert isinstance(found, PlainText)
    return found


def test_text_rows() -> None:
    assert text({"text": " Once upon a time"}) == PlainText("source", "row:1", " Once upon a time")
    assert text({"text": "a", "group": 2}).group == "group:2"
    assert text({"body": "a"}, text="body").text == "a"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["a"], "a list"),
        ({"a": 1}, "an object"),
        (b"a", "a bytes"),
        (datetime.datetime(2026, 1, 1), "a datetime"),
        (decimal.Decimal(1), "a Decimal"),
    ],
)
def test_what_is_no_text_is_told_as_what_it_is(value: Any, said: str) -> None:
    """The last three come from Parquet."""
    with pytest.raises(RefusedRow, match=f"'text' is {said}, expected text"):
        text({"text": value})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "content_not_text"),
        ({"text": ["a"]}, "content_not_text"),
        ({"text": " \n"}, "empty_text"),
        ({"texts": "a"}, "misspelt_field"),
        ({"text": "\udc00"}, "not_unicode"),
    ],
)
def test_text_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedRow) as caught:
        text(row)
    assert caught.value.reason == reason


def tokens(row: dict[str, Any], **fields: str) -> TokenRow:
    found = get_format("tokens")(row, "source", "row:1", "group", fields)
    assert isinstance(found, TokenRow)
    return found


IDS = [7, 8, 9, 10]


@pytest.mark.parametrize(
    ("row", "weights"),
    [
        ({"token_ids": IDS}, [0, 1, 1, 1]),
        ({"input_ids": IDS, "attention_mask": [1, 1, 1, 1]}, [0, 1, 1, 1]),
        ({"token_ids": IDS, "loss_weights": [0.5, 0, 0.25, 2]}, [0, 0, 0.25, 2]),
        ({"token_ids": IDS, "mask": [0, 0, 1, 1]}, [0, 0, 1, 1]),
        ({"token_ids": IDS, "mask": [True, False, True, False]}, [0, 0, 1, 0]),
        ({"input_ids": IDS, "completion_mask": [0, 0, 0, 1]}, [0, 0, 0, 1]),
        ({"input_ids": IDS, "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]}, [0, 0, 0, 1]),
        ({"input_ids": IDS, "labels": [-100, -100, 9, 10]}, [0, 0, 1, 1]),
        ({"input_ids": np.array(IDS), "labels": np.array([-100, 8, -100, 10])}, [0, 1, 0, 1]),
    ],
)
def test_weights_stand_beside_the_token_that_is_predicted(row: dict[str, Any], weights: list[float]) -> None:
    found = tokens(row)
    assert (found.token_ids.dtype, found.loss_weights.dtype) == (np.int32, np.float32)
    assert found.token_ids.tolist() == IDS
    assert found.loss_weights.tolist() == weights


def test_names_of_a_source_come_before_the_known_ones() -> None:
    row = {"ids": IDS, "input_ids": [1], "keep": [0, 1, 0, 0], "mask": [9]}
    found = tokens(row, token_ids="ids", mask="keep")
    assert (found.token_ids.tolist(), found.loss_weights.tolist()) == (IDS, [0, 1, 0, 0])


def test_a_name_given_to_one_field_is_no_longer_another_s() -> None:
    found = tokens({"labels": IDS}, token_ids="labels")
    assert (found.token_ids.tolist(), found.loss_weights.tolist()) == (IDS, [0, 1, 1, 1])
    assert tokens({"token_ids": IDS, "loss_mask": [0, 0, 0.5, 1]}, loss_weights="loss_mask").loss_weights[2] == 0.5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no_tokens"),
        ({"token_ids": []}, "no_tokens"),
        ({"token_ids": "7 8"}, "bad_token_ids"),
        ({"token_ids": [7.0, 8.0]}, "bad_token_ids"),
        ({"token_ids": ["7"]}, "bad_token_ids"),
        ({"token_ids": [7, -1]}, "bad_token_ids"),
        ({"token_ids": [7, 2**40]}, "bad_token_ids"),
        ({"token_ids": [7, 10**30]}, "bad_token_ids"),
        ({"token_ids": [7, None]}, "bad_token_ids"),
        ({"token_ids": [[7], [8]]}, "bad_token_ids"),
        ({"token_ids": [[7], [8, 9]]}, "bad_token_ids"),
        ({"token_ids": IDS, "mask": [1, 1]}, "lengths_differ"),
        ({"token_ids": IDS, "mask": [0, 1, 2, 1]}, "bad_weight"),
        ({"token_ids": IDS, "mask": "0111"}, "bad_weight"),
        ({"token_ids": IDS, "loss_weights": [0, 1, -1, 1]}, "bad_weight"),
        ({"token_ids": IDS, "loss_weights": [0, 1, float("nan"), 1]}, "bad_weight"),
        ({"token_ids": IDS, "loss_weights": [0, 1, 1e39, 1]}, "bad_weight"),
        ({"token_ids": IDS, "loss_weights": [0, None, 1, 1]}, "bad_weight"),
        ({"token_ids": IDS, "labels": [8, 9, 10, -100]}, "labels_differ"),
        ({"token_ids": IDS, "labels": IDS, "mask": [0, 0, 0, 1]}, "ambiguous_weights"),
        ({"token_ids": IDS, "mask": [0, 0, 1, 1], "loss_mask": [0, 0, 0, 1]}, "ambiguous_weights"),
        ({"token_ids": IDS, "mask": [0, 0, 1, 1], "assistant_masks": [0, 0, 0, 1]}, "ambiguous_weights"),
        ({"token_ids": IDS, "input_ids": [1]}, "ambiguous_tokens"),
        ({"token_ids": IDS, "attention_mask": [1, 1, 1, 0]}, "padded_tokens"),
        ({"token_ids": IDS, "loss_weight": [0, 0, 1, 1]}, "misspelt_field"),
    ],
)
def test_tokens_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedRow) as caught:
        tokens(row)
    assert caught.value.reason == reason
    assert caught.value.detail


@pytest.mark.parametrize(("value", "group"), [(7, "id:7"), (7.0, "id:7"), ("7", "id:7"), (7.5, "id:7.5")])
def test_a_group_is_the_same_as_whatever_number_it_is_written(value: Any, group: str) -> None:
    """Else rows of one conversation, from JSON and from Parquet, stand on both sides of the split."""
    assert get_format("text")({"text": "t", "id": value}, "s", "r", "id", {}).group == group


def test_a_group_that_is_no_number_is_none() -> None:
    assert get_format("text")({"text": "t", "id": float("nan")}, "s", "r", "id", {}).group is None
