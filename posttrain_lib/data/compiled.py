"""The inner loops of packing, compiled by numba: once per machine, on first use, in some seconds.

Imported only where numba is installed and the loops are needed: it takes about half a second to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from posttrain_lib.data.packing import ROWS_AHEAD


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when first called, and kept on disk where the package's folder or numba's own can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to keep it in: compile again in every process
        return numba.njit(nogil=True)(function)


@_compiled
def lay_out_loop(
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
    # Slices and one loop an array: so the compiler sees that nothing overlaps, and copies many at a time.
    for i in range(len(begins)):
        begin, place, length, first = begins[i], places[i], np.int64(lengths[i]), firsts[i]
        read, weighed = tokens[begin : begin + length], weights[begin : begin + length]
        written, targets = token_ids[place : place + length], target_ids[place : place + length]
        weighing, counted = loss_weights[place : place + length], positions[place : place + length]
        for t in range(length):
            written[t] = read[t]
        for t in range(length - 1):
            targets[t] = read[t + 1]
        for t in range(length - 1):
            weighing[t] = weighed[t + 1]
        for t in range(length):
            counted[t] = first + t
        targets[length - 1] = 0
        weighing[length - 1] = 0.0


@_compiled
def place_loop(lengths: Any, per_row: Any, row_tokens: int, longest_padding: int) -> tuple[Any, Any]:
    free = row_tokens * len(per_row) - lengths.sum()
    most = len(lengths) + free // longest_padding + len(per_row)
    bounds, segments = np.empty(most + 1, np.int64), np.empty(most, np.int64)
    count, segment = 0, 0
    for row in range(len(per_row)):
        place, end = row * row_tokens, (row + 1) * row_tokens
        for _ in range(per_row[row]):
            bounds[count], segments[count] = place, segment
            place += lengths[segment]
            segment += 1
            count += 1
        while place < end:
            bounds[count], segments[count] = place, -1
            place = min(end, place + longest_padding)
            count += 1
    bounds[count] = row_tokens * len(per_row)
    return bounds[: count + 1], segments[:count]


@_compiled
def pad_loop(bounds: Any, segments: Any, token_ids: Any, target_ids: Any, loss_weights: Any, positions: Any) -> None:
    for i in range(len(segments)):
        if segments[i] < 0:
            begin, end = bounds[i], bounds[i + 1]
            token_ids[begin:end] = 0
            target_ids[begin:end] = 0
            loss_weights[begin:end] = 0.0
            for t in range(begin, end):
                positions[t] = t - begin


@_compiled
def nonzero_loop(values: Any, places: Any) -> int:
    count = 0
    for place in range(len(values)):
        places[count] = place
        count += values[place] != 0
    return count


@_compiled
def _highest(occupied: Any, limit: int) -> int:
    """The highest set bit of a bit map at or below ``limit``; 0 where there is none (nothing is 0 tokens long)."""
    word = limit >> 6
    above = np.uint64(63 - (limit & 63))
    bits = (occupied[word] << above) >> above
    while bits == np.uint64(0) and word > 0:
        word -= 1
        bits = occupied[word]
    if bits == np.uint64(0):
        return 0
    found = word << 6
    for shift in (32, 16, 8, 4, 2, 1):
        if bits >> np.uint64(shift) != np.uint64(0):
            bits >>= np.uint64(shift)
            found += shift
    return found


@_compiled
def _append(slot: int, length: int, heads: Any, tails: Any, follower: Any, occupied: Any) -> None:
    """Put a slot at the end of its length's list."""
    if tails[length] >= 0:
        follower[tails[length]] = slot
    else:
        heads[length] = slot
        occupied[length >> 6] |= np.uint64(1) << np.uint64(length & 63)
    tails[length] = slot


@_compiled
def _take_head(length: int, heads: Any, tails: Any, follower: Any, occupied: Any) -> int:
    """Take the first slot of a length's list."""
    slot: int = heads[length]
    heads[length] = follower[slot]
    if heads[length] < 0:
        tails[length] = -1
        occupied[length >> 6] &= ~(np.uint64(1) << np.uint64(length & 63))
    return slot


@_compiled
def pack_loop(
    ids: Any,
    lengths: Any,
    wanted: int,
    flush: bool,
    row_tokens: int,
    buffer: int,
    look_ahead: int,
    counters: Any,
    slot_id: Any,
    slots: Any,
    lists: Any,
    occupied: Any,
    out: Any,
    out_ends: Any,
) -> tuple[int, int]:
    """Take units in until ``wanted`` rows are made or there are no more; with ``flush``, make rows of what waits.

    The waiting units lie in slots. Units of one length form a list in order of arrival (``heads``, ``follower``,
    ``tails``); ``occupied`` has a bit for every length that waits, so that "the longest that fits" is the highest bit
    at or below the free space. ``older`` and ``newer`` link all slots by arrival. ``slot_id`` has ids and numbers of
    arrival. ``counters``: units that wait, the oldest slot, the newest, free slots, waiting tokens, units that ever
    came. ``out`` receives the ids of the rows, ``out_ends`` where each row ends.

    Returns:
        (units taken in, rows made).
    """
    slot_length, follower, older, newer, free = slots[0], slots[1], slots[2], slots[3], slots[4]
    heads, tails = lists[0], lists[1]
    waiting, oldest, newest = counters[0], counters[1], counters[2]
    unused, tokens, arrivals = counters[3], counters[4], counters[5]
    taken, rows, written = 0, 0, 0
    while rows < wanted:
        while waiting < buffer and taken < len(ids) and (waiting < look_ahead or tokens < ROWS_AHEAD * row_tokens):
            unused -= 1
            slot, length = free[unused], lengths[taken]
            slot_id[0, slot], slot_id[1, slot], slot_length[slot] = ids[taken], arrivals, length
            arrivals += 1
            tokens += length
            follower[slot], older[slot], newer[slot] = -1, newest, -1
            if newest >= 0:
                newer[newest] = slot
            else:
                oldest = slot
            newest = slot
            _append(slot, length, heads, tails, follower, occupied)
            waiting += 1
            taken += 1
        ready = waiting >= buffer or (waiting >= look_ahead and tokens >= ROWS_AHEAD * row_tokens)
        if waiting == 0 or not (ready or flush):
            break
        # The oldest of all is the oldest of its length: every unit of the row is the head of a list.
        length, space = slot_length[oldest], row_tokens
        while length > 0:
            slot = _take_head(length, heads, tails, follower, occupied)
            before, after = older[slot], newer[slot]
            if before >= 0:
                newer[before] = after
            else:
                oldest = after
            if after >= 0:
                older[after] = before
            else:
                newest = before
            out[written] = slot_id[0, slot]
            slot_id[1, slot] = -1
            tokens -= length
            written += 1
            free[unused] = slot
            unused += 1
            waiting -= 1
            space -= length
            length = _highest(occupied, space)
        out_ends[rows] = written
        rows += 1
    counters[0], counters[1], counters[2] = waiting, oldest, newest
    counters[3], counters[4], counters[5] = unused, tokens, arrivals
    return taken, rows
