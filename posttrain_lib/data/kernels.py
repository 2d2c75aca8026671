"""Laying tokens out in packed arrays, the inner loop of building a batch.

Like the packer it exists twice: compiled (:mod:`~posttrain_lib.data.compiled`) where numba is installed, and in numpy,
for a bare machine, which is what the compiled one is tested against.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import numpy as np

#: (tokens, weights, begins, lengths, firsts, places, token_ids, target_ids, loss_weights, positions) -> None
LayOut = Callable[..., None]


def has_numba() -> bool:
    """Whether the compiled versions can be had."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def lay_out() -> LayOut:
    """The fastest version of :func:`lay_out_plain` that this machine has."""
    if not has_numba():
        return lay_out_plain
    from posttrain_lib.data import compiled

    return compiled.lay_out_loop


@functools.cache
def place_rows() -> Callable[[np.ndarray, np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]:
    """The fastest version of :func:`place_rows_plain` that this machine has."""
    if not has_numba():
        return place_rows_plain
    from posttrain_lib.data import compiled

    return compiled.place_loop


@functools.cache
def pad() -> Callable[..., None]:
    """The fastest version of :func:`pad_plain` that this machine has."""
    if not has_numba():
        return pad_plain
    from posttrain_lib.data import compiled

    return compiled.pad_loop


@functools.cache
def nonzero() -> Callable[[np.ndarray, np.ndarray], int]:
    """The fastest version of :func:`nonzero_plain` that this machine has."""
    if not has_numba():
        return nonzero_plain
    from posttrain_lib.data import compiled

    return compiled.nonzero_loop


def warm() -> None:
    """Load what is compiled, or compile it: half a second to some seconds that a first step need not wait for."""
    if not has_numba():
        return
    from posttrain_lib.data.packing import make_packer

    one, length = np.zeros(1, np.int64), np.ones(1, np.int32)
    packer = make_packer(4, 1)
    packer.feed(one, length, 1)
    arrays = [np.zeros(4, kind) for kind in (np.int32, np.int32, np.float32, np.int32)]
    bounds, segments = place_rows()(length, np.ones(1, np.int64), 4, 4)
    pad()(bounds, segments, *arrays)
    nonzero()(arrays[2], arrays[0])
    for writeable in (False, True):  # a store's files are mapped read-only; rows read live are not
        tokens, weights = np.zeros(1, np.int32), np.zeros(1, np.float32)
        tokens.flags.writeable = weights.flags.writeable = writeable
        lay_out()(tokens, weights, one, length, np.zeros(1, np.int32), one, *arrays)


def place_rows_plain(
    lengths: np.ndarray, per_row: np.ndarray, row_tokens: int, longest_padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the segments of rows lie, rows end to end, and the padding behind those of each row.

    Args:
        lengths: int32 [n] tokens of the segments, in order. per_row: int64 [rows] segments of each row.
        longest_padding: what a row leaves free is parted into documents of so many tokens at most.

    Returns:
        bounds int64 [m+1] of all that lies in the rows, from 0 to ``rows * row_tokens``, and segments int64 [m]: the
        number of the segment between two bounds, -1 for padding.
    """
    bounds: list[int] = []
    segments: list[int] = []
    sizes, segment = lengths.tolist(), 0
    for row, count in enumerate(per_row.tolist()):
        place, end = row * row_tokens, (row + 1) * row_tokens
        for segment in range(segment, segment + count):  # noqa: B020 - goes on where the last row stopped
            bounds.append(place)
            segments.append(segment)
            place += sizes[segment]
        segment += count > 0
        padding = range(place, end, longest_padding)
        bounds.extend(padding)
        segments.extend([-1] * len(padding))
    return np.array([*bounds, len(per_row) * row_tokens], np.int64), np.array(segments, np.int64)


def pad_plain(
    bounds: np.ndarray,
    segments: np.ndarray,
    token_ids: np.ndarray,
    target_ids: np.ndarray,
    loss_weights: np.ndarray,
    positions: np.ndarray,
) -> None:
    """Make everything of segment -1 a document of zeros; see :func:`place_rows_plain`."""
    for i in np.flatnonzero(segments < 0).tolist():
        begin, end = int(bounds[i]), int(bounds[i + 1])
        token_ids[begin:end] = 0
        target_ids[begin:end] = 0
        loss_weights[begin:end] = 0.0
        positions[begin:end] = np.arange(end - begin, dtype=np.int32)


def nonzero_plain(values: np.ndarray, places: np.ndarray) -> int:
    """Write the places of values that are not 0, in order, and return how many they are.

    Args:
        values: float32 [n]. places: int32 [n].
    """
    found = np.flatnonzero(values)
    places[: len(found)] = found
    return len(found)


def lay_out_plain(
    tokens: np.ndarray,
    weights: np.ndarray,
    begins: np.ndarray,
    lengths: np.ndarray,
    firsts: np.ndarray,
    places: np.ndarray,
    token_ids: np.ndarray,
    target_ids: np.ndarray,
    loss_weights: np.ndarray,
    positions: np.ndarray,
) -> None:
    """Copy segments of documents to their places in packed arrays.

    Segment i is ``tokens[begins[i]:begins[i] + lengths[i]]`` and goes to ``places[i]``. Its weights move from the
    predicted token to the one that predicts it; its last token predicts nothing. Positions count from ``firsts[i]``.

    Args:
        tokens: int32 flat. weights: float32 flat, target-aligned.
        begins, places: int64 [n]. lengths, firsts: int32 [n].
        token_ids, target_ids, positions: int32 [T], loss_weights: float32 [T]; filled in place.
    """
    longest = int((firsts + lengths).max()) if len(lengths) else 0
    count = np.arange(longest, dtype=np.int32)
    for begin, length, first, place in zip(
        begins.tolist(), lengths.tolist(), firsts.tolist(), places.tolist(), strict=True
    ):
        end = place + length
        token_ids[place:end] = tokens[begin : begin + length]
        target_ids[place : end - 1] = tokens[begin + 1 : begin + length]
        loss_weights[place : end - 1] = weights[begin + 1 : begin + length]
        target_ids[end - 1], loss_weights[end - 1] = 0, 0.0
        positions[place:end] = count[first : first + length]
