"""Packing on the fly: which units share a row, decided from their lengths alone.

A *unit* is what must not be parted: a document, or several that share a prefix, or a preference pair. A row starts
with the oldest unit in the buffer and then takes, again and again, the longest one that still fits (of equally long
ones the oldest). Starting with the oldest bounds the delay: a unit leaves at the latest with the ``buffer``-th row
after it came. Taking the longest that fits leaves the short ones, which are what fills the gaps.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Protocol

import numpy as np

from posttrain_lib.data import kernels
from posttrain_lib.errors import DataError

Row = tuple[int, ...]


class Rows:
    """Rows of units, end to end in one array: a step has hundreds of units, and what follows works on arrays.

    Attributes:
        units: int64 [n], the units of all rows. counts: int64 [R], how many of them each row has.
    """

    def __init__(self, units: np.ndarray, counts: np.ndarray) -> None:
        self.units, self.counts = units, counts

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Rows:
        """From the unit ids of each row."""
        return cls(np.fromiter(chain.from_iterable(rows), np.int64), np.fromiter(map(len, rows), np.int64, len(rows)))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of several, in order."""
        if len(parts) == 1:
            return parts[0]
        nothing = np.empty(0, np.int64)
        return cls(
            np.concatenate([nothing, *(part.units for part in parts)]),
            np.concatenate([nothing, *(part.counts for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[Row]:
        members, bounds = self.units.tolist(), [0, *np.cumsum(self.counts).tolist()]
        return (tuple(members[begin:end]) for begin, end in pairwise(bounds))

    def filled_up(self, rows: int) -> Rows:
        """These and as many empty ones as make ``rows``."""
        return Rows(self.units, np.append(self.counts, np.zeros(rows - len(self), np.int64)))

    def take(self, numbers: Sequence[int] | np.ndarray) -> Rows:
        """The rows of these numbers, in that order."""
        counts = self.counts[numbers]
        starts = (np.cumsum(self.counts) - self.counts)[numbers]
        places = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return Rows(self.units[places], counts)


#: rows' worth of tokens that wait before a row is made with a look-ahead shorter than the buffer: with less, a row of
#: many short units would take nearly all there is
ROWS_AHEAD = 4


class Packer(Protocol):
    """Packs a stream of (unit id, length) into rows of at most ``row_tokens``; two versions, one behaviour."""

    row_tokens: int
    buffer: int

    def __len__(self) -> int:
        """Units that wait."""

    def feed(
        self, ids: np.ndarray, lengths: np.ndarray, wanted: int, look_ahead: int | None = None
    ) -> tuple[int, Rows]:
        """Take units in until ``wanted`` rows are made: (how many were taken in, those rows).

        Args:
            ids: int64 [n]. lengths: int32 [n], packed tokens of each.
            look_ahead: make a row as soon as so many units wait, and :data:`ROWS_AHEAD` rows' worth of tokens; by
                default and at most when ``buffer`` units do.

        Raises:
            DataError: a unit does not fit into any row.
        """

    def flush(self, wanted: int) -> Rows:
        """At most ``wanted`` rows of what waits, however little it is."""

    def state(self) -> list[int]:
        """Ids of the waiting units, oldest first; JSON-ready. It is the whole state."""

    def load_state(self, waiting: Sequence[int], lengths: Sequence[int]) -> None:
        """Make ``waiting`` (as given by :meth:`state`) the buffer; ``lengths[i]`` is the length of ``waiting[i]``."""


def make_packer(row_tokens: int, buffer: int) -> Packer:
    """The fastest packer that this machine has."""
    return CompiledPacker(row_tokens, buffer) if kernels.has_numba() else StreamingPacker(row_tokens, buffer)


class CompiledPacker:
    """The rule of the module's text, compiled: a list per length and a bit per list that is not empty.

    Taking a unit in is O(1), taking one out O(row_tokens / 64) at worst.
    """

    def __init__(self, row_tokens: int, buffer: int) -> None:
        _check_sizes(row_tokens, buffer)
        self.row_tokens, self.buffer = row_tokens, buffer
        from posttrain_lib.data.compiled import pack_loop

        self._loop = pack_loop
        self._clear()

    def _clear(self) -> None:
        buffer, lengths = self.buffer, self.row_tokens + 1
        # units that wait, the oldest slot, the newest, free slots, waiting tokens, units that ever came
        self._counters = np.array([0, -1, -1, buffer, 0, 0], np.int64)
        self._slot_id = np.full((2, buffer), -1, np.int64)  # ids, and numbers of arrival (-1: the slot is free)
        # per slot: length, next of its length, next older, next newer; and the free slots
        self._slots = np.full((5, buffer), -1, np.int32)
        self._slots[4] = np.arange(buffer)
        self._lists = np.full((2, lengths), -1, np.int32)  # per length: oldest and newest slot
        self._occupied = np.zeros((lengths >> 6) + 1, np.uint64)

    def __len__(self) -> int:
        return int(self._counters[0])

    def feed(
        self, ids: np.ndarray, lengths: np.ndarray, wanted: int, look_ahead: int | None = None
    ) -> tuple[int, Rows]:
        """See :class:`Packer`."""
        _check_lengths(ids, lengths, self.row_tokens)
        return self._run(ids, lengths, wanted, min(look_ahead or self.buffer, self.buffer), flush=False)

    def flush(self, wanted: int) -> Rows:
        """See :class:`Packer`."""
        return self._run(np.empty(0, np.int64), np.empty(0, np.int32), wanted, self.buffer, flush=True)[1]

    def _run(
        self, ids: np.ndarray, lengths: np.ndarray, wanted: int, look_ahead: int, *, flush: bool
    ) -> tuple[int, Rows]:
        out = np.empty(len(self) + len(ids), np.int64)
        wanted = min(wanted, len(out))
        ends = np.empty(wanted, np.int64)
        taken, rows = self._loop(
            ids, lengths, wanted, flush, self.row_tokens, self.buffer, look_ahead, self._counters, self._slot_id,
            self._slots, self._lists, self._occupied, out, ends,
        )  # fmt: skip
        counts = np.diff(ends[:rows], prepend=0)
        return taken, Rows(out[: counts.sum()], counts)

    def state(self) -> list[int]:
        """See :class:`Packer`."""
        ids, arrivals = self._slot_id
        waiting = np.flatnonzero(arrivals >= 0)
        return ids[waiting[np.argsort(arrivals[waiting])]].tolist()

    def load_state(self, waiting: Sequence[int], lengths: Sequence[int]) -> None:
        """See :class:`Packer`."""
        self._clear()
        taken, rows = self.feed(np.asarray(waiting, np.int64), np.asarray(lengths, np.int32), 1)
        assert taken == len(waiting) and len(rows) == 0, "a saved buffer is never full"


class StreamingPacker:
    """The same rule in plain Python: the reference, and what runs where numba is not installed."""

    def __init__(self, row_tokens: int, buffer: int) -> None:
        _check_sizes(row_tokens, buffer)
        self.row_tokens, self.buffer = row_tokens, buffer
        # Waiting units twice: by arrival (arrival -> id, length) and sorted by (length, -arrival), so that of
        # equally long ones the oldest comes last, where "the longest that fits" looks first.
        self._waiting: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._by_length: list[tuple[int, int]] = []
        self._arrivals, self._tokens = 0, 0

    def __len__(self) -> int:
        return len(self._waiting)

    def feed(
        self, ids: np.ndarray, lengths: np.ndarray, wanted: int, look_ahead: int | None = None
    ) -> tuple[int, Rows]:
        """See :class:`Packer`."""
        _check_lengths(ids, lengths, self.row_tokens)
        look_ahead = min(look_ahead or self.buffer, self.buffer)
        taken, rows = 0, list[Row]()
        while len(rows) < wanted:
            while taken < len(ids) and not self._is_ready(look_ahead):
                self._take_in(int(ids[taken]), int(lengths[taken]))
                taken += 1
            if not self._is_ready(look_ahead):
                break
            rows.append(self._pop_row())
        return taken, Rows.of(rows)

    def _is_ready(self, look_ahead: int) -> bool:
        waiting = len(self._waiting)
        return waiting >= self.buffer or (waiting >= look_ahead and self._tokens >= ROWS_AHEAD * self.row_tokens)

    def _take_in(self, unit: int, length: int) -> None:
        self._waiting[self._arrivals] = (unit, length)
        insort(self._by_length, (length, -self._arrivals))
        self._tokens += length
        self._arrivals += 1

    def flush(self, wanted: int) -> Rows:
        """See :class:`Packer`."""
        rows: list[Row] = []
        while self._waiting and len(rows) < wanted:
            rows.append(self._pop_row())
        return Rows.of(rows)

    def _pop_row(self) -> Row:
        oldest, (unit, length) = self._waiting.popitem(last=False)
        by_length = self._by_length
        del by_length[bisect_right(by_length, (length, -oldest)) - 1]
        row = [unit]
        space = self.row_tokens - length
        while by_length and by_length[0][0] <= space:
            # (space, 1) sorts behind every entry of length `space`, for arrivals are stored negated.
            length, negated = by_length.pop(bisect_right(by_length, (space, 1)) - 1)
            row.append(self._waiting.pop(-negated)[0])
            space -= length
        self._tokens -= self.row_tokens - space
        return tuple(row)

    def state(self) -> list[int]:
        """See :class:`Packer`."""
        return [unit for unit, _ in self._waiting.values()]

    def load_state(self, waiting: Sequence[int], lengths: Sequence[int]) -> None:
        """See :class:`Packer`."""
        self._waiting = OrderedDict(
            (arrival, (int(unit), int(length)))
            for arrival, (unit, length) in enumerate(zip(waiting, lengths, strict=True))
        )
        self._by_length = sorted((length, -arrival) for arrival, (_, length) in self._waiting.items())
        self._arrivals, self._tokens = len(self._waiting), sum(int(length) for length in lengths)


def _check_sizes(row_tokens: int, buffer: int) -> None:
    if row_tokens < 1 or buffer < 1:
        raise DataError("the packer needs a positive row length and buffer", got=(row_tokens, buffer))


def _check_lengths(ids: np.ndarray, lengths: np.ndarray, row_tokens: int) -> None:
    wrong = np.flatnonzero((lengths < 1) | (lengths > row_tokens))
    if len(wrong):
        raise DataError(
            "an example does not fit into a packed row",
            where=f"example {ids[wrong[0]]}",
            got=f"{lengths[wrong[0]]} tokens",
            expected=f"1 to {row_tokens} tokens (train.row_tokens)",
            fix="raise train.row_tokens or lower data.max_example_tokens",
        )
