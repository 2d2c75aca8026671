"""The two inner loops of packing, compiled: which units share a row, and laying their tokens out.

Each exists twice. The compiled version runs where numba is installed; the other is plain Python and numpy, for a bare
machine, and is what the compiled one is tested against (``packing.StreamingPacker``, :func:`lay_out_plain`).
numba takes about half a second to import and, once per machine, some seconds to compile; it is imported on first use.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

#: (tokens, weights, begins, lengths, firsts, places, token_ids, target_ids, loss_weights, positions) -> None
LayOut = Callable[..., None]


def has_numba() -> bool:
    """Whether the compiled versions can be had."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def lay_out() -> LayOut:
    """The fastest version of :func:`lay_out_plain` that this machine has."""
    return _compiled(_lay_out_loop) if has_numba() else lay_out_plain


@functools.cache
def pack_loop() -> Callable[..., tuple[int, int]]:
    """The compiled :func:`_pack_loop`.

    Raises:
        ImportError: numba is not installed.
    """
    return _compiled(_pack_loop)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, and kept on disk where the package's folder (or numba's own cache folder) can be written."""
    import numba

    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to keep it in: compile again in every process
        return numba.njit(nogil=True)(function)


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
        tokens: int32 flat. weights: float32 flat, target-aligned. begins, places: int64 [n]. lengths, firsts: int32 [n].
        token_ids, target_ids, positions: int32 [T], loss_weights: float32 [T]; zeros, filled in place.
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
        positions[place:end] = count[first : first + length]


def _lay_out_loop(
    tokens: Any,
    weights: Any,
    begins: Any,
    lengths: Any,
    firsts: Any,
    places: Any,
    token_ids: Any,
    target_ids: Any,
    loss_weights: Any,
    positions: Any,
) -> None:
    for i in range(len(begins)):
        begin, place, last, first = begins[i], places[i], lengths[i] - 1, firsts[i]
        for t in range(last):
            token_ids[place + t] = tokens[begin + t]
            target_ids[place + t] = tokens[begin + t + 1]
            loss_weights[place + t] = weights[begin + t + 1]
            positions[place + t] = first + t
        token_ids[place + last] = tokens[begin + last]
        positions[place + last] = first + last


def _pack_loop(
    ids: Any,
    lengths: Any,
    wanted: int,
    flush: bool,
    row_tokens: int,
    buffer: int,
    counters: Any,
    slot_id: Any,
    slot_length: Any,
    follower: Any,
    older: Any,
    newer: Any,
    free: Any,
    heads: Any,
    tails: Any,
    occupied: Any,
    out: Any,
    out_ends: Any,
) -> tuple[int, int]:
    """Take units in until ``wanted`` rows are made or there are no more; with ``flush``, make rows of what waits.

    The waiting units lie in slots. Units of one length form a list in order of arrival (``heads``, ``follower``,
    ``tails``); ``occupied`` has a bit for every length that waits, so that "the longest that fits" is the highest bit
    at or below the free space. ``older`` and ``newer`` link all slots by arrival. ``counters``: units that wait, the
    oldest slot, the newest, free slots. ``out`` receives the ids of the rows, ``out_ends`` where each row ends.

    Returns:
        (units taken in, rows made).
    """
    waiting, oldest, newest, unused = counters[0], counters[1], counters[2], counters[3]
    taken, rows, written = 0, 0, 0
    while rows < wanted:
        while waiting < buffer and taken < len(ids):
            unused -= 1
            slot, length = free[unused], lengths[taken]
            slot_id[slot], slot_length[slot] = ids[taken], length
            follower[slot], older[slot], newer[slot] = -1, newest, -1
            if newest >= 0:
                newer[newest] = slot
            else:
                oldest = slot
            newest = slot
            if tails[length] >= 0:
                follower[tails[length]] = slot
            else:
                heads[length] = slot
                occupied[length >> 6] |= np.uint64(1) << np.uint64(length & 63)
            tails[length] = slot
            waiting += 1
            taken += 1
        if waiting == 0 or (waiting < buffer and not flush):
            break
        # The oldest of all is the oldest of its length: every unit of the row is the head of a list.
        length, space = slot_length[oldest], row_tokens
        while length > 0:
            slot = heads[length]
            heads[length] = follower[slot]
            if heads[length] < 0:
                tails[length] = -1
                occupied[length >> 6] &= ~(np.uint64(1) << np.uint64(length & 63))
            before, after = older[slot], newer[slot]
            if before >= 0:
                newer[before] = after
            else:
                oldest = after
            if after >= 0:
                older[after] = before
            else:
                newest = before
            out[written] = slot_id[slot]
            written += 1
            free[unused] = slot
            unused += 1
            waiting -= 1
            space -= length
            word = space >> 6
            above = np.uint64(63 - (space & 63))
            bits = (occupied[word] << above) >> above
            while bits == np.uint64(0) and word > 0:
                word -= 1
                bits = occupied[word]
            length = word << 6
            if bits == np.uint64(0):
                length = 0
            else:
                for shift in (32, 16, 8, 4, 2, 1):
                    if bits >> np.uint64(shift) != np.uint64(0):
                        bits >>= np.uint64(shift)
                        length += shift
        out_ends[rows] = written
        rows += 1
    counters[0], counters[1], counters[2], counters[3] = waiting, oldest, newest, unused
    return taken, rows
