"""Packing on the fly: which examples share a row, decided from their lengths alone.

A row starts with the oldest example in the buffer and then takes, again and again, the longest one that still fits.
Starting with the oldest bounds the delay: an example leaves at the latest with the ``buffer``-th row after it came.
Taking the longest that fits leaves the short ones, which are what fills the gaps.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Sequence

from posttrain_lib.errors import DataError

Row = tuple[int, ...]


class StreamingPacker:
    """Packs a stream of (example id, length) into rows of at most ``row_tokens``.

    Deterministic; its whole state is the ids that wait, in order of arrival. One row costs
    O(examples in it * log(buffer)) plus short memory moves in a list of ``buffer`` entries.

    Args:
        row_tokens: capacity of a row.
        buffer: examples to choose from; more fill better and delay longer.
    """

    def __init__(self, row_tokens: int, buffer: int) -> None:
        if row_tokens < 1 or buffer < 1:
            raise DataError("the packer needs a positive row length and buffer", got=(row_tokens, buffer))
        self.row_tokens = row_tokens
        self.buffer = buffer
        # Waiting examples twice: by arrival (arrival -> id, length) and sorted by (length, -arrival), so that of
        # equally long ones the oldest comes last, where "the longest that fits" looks first.
        self._waiting: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._by_length: list[tuple[int, int]] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, example: int, length: int) -> list[Row]:
        """Take one example in; return the rows that this finishes: one when the buffer is full, else none.

        Raises:
            DataError: the example does not fit into any row.
        """
        if not 1 <= length <= self.row_tokens:
            raise DataError(
                "an example does not fit into a packed row",
                where=f"example {example}",
                got=f"{length} tokens",
                expected=f"1 to {self.row_tokens} tokens (train.row_tokens)",
                fix="raise train.row_tokens or lower data.max_example_tokens",
            )
        arrival = self._arrivals
        self._arrivals += 1
        self._waiting[arrival] = (example, length)
        insort(self._by_length, (length, -arrival))
        return [self.pop_row()] if len(self._waiting) >= self.buffer else []

    def pop_row(self) -> Row:
        """Form one row from what waits, however little it is; an empty row when nothing waits."""
        if not self._waiting:
            return ()
        oldest, (example, length) = self._waiting.popitem(last=False)
        by_length = self._by_length
        del by_length[bisect_right(by_length, (length, -oldest)) - 1]
        row = [example]
        space = self.row_tokens - length
        while by_length and by_length[0][0] <= space:
            # (space, 1) sorts behind every entry of length `space`, for arrivals are stored negated.
            length, negated = by_length.pop(bisect_right(by_length, (space, 1)) - 1)
            row.append(self._waiting.pop(-negated)[0])
            space -= length
        return tuple(row)

    def flush(self) -> list[Row]:
        """Form rows until nothing waits."""
        rows = []
        while self._waiting:
            rows.append(self.pop_row())
        return rows

    def state(self) -> list[int]:
        """Ids of the waiting examples, oldest first; JSON-ready."""
        return [example for example, _ in self._waiting.values()]

    def load_state(self, waiting: Sequence[int], lengths: Sequence[int]) -> None:
        """Make ``waiting`` (as given by :meth:`state`) the buffer; ``lengths[i]`` is the length of ``waiting[i]``."""
        self._waiting = OrderedDict(
            (arrival, (int(example), int(length)))
            for arrival, (example, length) in enumerate(zip(waiting, lengths, strict=True))
        )
        self._by_length = sorted((length, -arrival) for arrival, (_, length) in self._waiting.items())
        self._arrivals = len(self._waiting)
