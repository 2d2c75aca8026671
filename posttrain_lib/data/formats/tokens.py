"""Rows that come as token ids, with a mask, labels or float weights; with none of them, every token is learned.

All four lists have the length of the ids and are aligned with the token that is *predicted*: place i of ``mask``,
``labels`` or ``loss_weights`` belongs to the loss of predicting token i from those before it. ``labels`` are therefore
Hugging Face's unshifted ones: the id itself where it is learned, -100 where it is not. The first token is predicted
from nothing, so its weight is 0 whatever the row says.

``completion_mask`` and ``assistant_masks`` together mean what both leave, as in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain_lib.data.formats.common import LEAST_WEIGHT, MOST_WEIGHT, check_spelling, is_list, named_group
from posttrain_lib.data.refusal import RefusedRow, kind_of
from posttrain_lib.schema.examples import TokenRow

FIELDS = ("token_ids", "loss_weights", "mask", "labels", "attention_mask")
NEEDED = ("token_ids",)

#: further names that the field's data sets use, looked for where the source's ``fields`` say nothing
ALSO = {"token_ids": ("input_ids",), "mask": ("loss_mask", "completion_mask", "assistant_masks")}
#: TRL writes both into one row, and learns what neither of them leaves out
_MULTIPLIED = ["completion_mask", "assistant_masks"]
_WEIGHTS = ("loss_weights", "mask", "labels")
_NOT_LEARNED = -100


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> TokenRow:
    """Validate a row.

    Raises:
        RefusedRow: no ids, or two lists of them; lists of other lengths or kinds, more than one kind of weights,
            padding, or labels that are not the ids they stand beside (as labels shifted by one are not).
    """
    names = {name: _names(name, fields) for name in FIELDS}
    given = {name: [called for called in names[name] if row.get(called) is not None] for name in FIELDS}
    # Of a field that the row has under one of its names, the other names are no misspelling's.
    check_spelling(row, tuple(called for name in FIELDS for called in given[name] or names[name][:1]), (), "the row")
    ids = _ids(row, given["token_ids"], names["token_ids"][0])
    weighted = [(name, called) for name in _WEIGHTS for called in given[name]]
    if len(weighted) > 1 and [called for _, called in weighted] != _MULTIPLIED:
        raise RefusedRow("ambiguous_weights", f"the row has {' and '.join(called for _, called in weighted)}")
    weights = np.ones(len(ids), np.float32)
    for name, called in weighted:
        weights *= _weights(name, called, row[called], ids)
    for called in given["attention_mask"]:
        if not _like(row[called], called, ids, "bad_token_ids").all():
            raise RefusedRow("padded_tokens", f"{called!r} is 0 somewhere: give the row unpadded")
    weights[0] = 0.0
    return TokenRow(source, row_id, ids.astype(np.int32), weights, named_group(row, group_field))


def _names(name: str, fields: Mapping[str, str]) -> list[str]:
    """What rows may call it: what the source says, else every known name that is not another field's."""
    if name in fields:
        return [fields[name]]
    return [called for called in (name, *ALSO.get(name, ())) if called not in fields.values()]


def _ids(row: Mapping[str, Any], given: Sequence[str], name: str) -> np.ndarray:
    """The token ids [S] of the one list that the row has."""
    if len(given) > 1:
        raise RefusedRow("ambiguous_tokens", f"the row has {' and '.join(given)}")
    called = given[0] if given else name
    ids = _list(row.get(called), called, "bad_token_ids")
    if not len(ids):
        raise RefusedRow("no_tokens", f"{called!r} is empty")
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise RefusedRow("bad_token_ids", f"{called!r} holds what is no token id")
    return ids


def _weights(kind: str, name: str, raw: Any, ids: np.ndarray) -> np.ndarray:
    values = _like(raw, name, ids, "bad_weight")
    if kind == "labels":
        learned = values != _NOT_LEARNED
        if (other := np.flatnonzero(learned & (values != ids))).size:
            place = int(other[0])
            raise RefusedRow(
                "labels_differ", f"{name!r} has {values[place]} at place {place}, where the token is {ids[place]}"
            )
        return learned.astype(np.float32)
    fits = (values == 0) | ((values >= LEAST_WEIGHT) & (values <= MOST_WEIGHT))
    if kind == "mask":
        fits = (values == 0) | (values == 1)
    if not fits.all():
        place = int(np.flatnonzero(~fits)[0])
        expected = "0 or 1" if kind == "mask" else f"0 or {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
        raise RefusedRow("bad_weight", f"{name!r} has {values[place]} at place {place}, expected {expected}")
    return values.astype(np.float32)


def _like(raw: Any, name: str, ids: np.ndarray, reason: str) -> np.ndarray:
    values = _list(raw, name, reason)
    if len(values) != len(ids):
        raise RefusedRow("lengths_differ", f"{name!r} has {len(values)} places for {len(ids)} token ids")
    if values.dtype.kind not in "biuf":
        raise RefusedRow(reason, f"{name!r} holds what is no number")
    return values


def _list(raw: Any, name: str, reason: str) -> np.ndarray:
    """The values as an array [S]."""
    if raw is None:
        raise RefusedRow("no_tokens", f"{name!r} is missing")
    if not is_list(raw) and not isinstance(raw, np.ndarray):
        raise RefusedRow(reason, f"{name!r} is {kind_of(raw)}, expected a list of numbers")
    try:
        values = np.asarray(raw)
    except (ValueError, OverflowError) as error:  # lists within the list, numbers beyond 64 bits
        raise RefusedRow(reason, f"{name!r} is no list of numbers: {error}") from error
    if values.ndim != 1:
        raise RefusedRow(reason, f"{name!r} is a list of lists, expected one of numbers")
    return values
