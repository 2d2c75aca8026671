"""Units: what the packer must not part.

A unit is a run of examples of one row of the source: a single document; documents that begin alike and are packed
together so that the common part is computed once; or a preference pair. Its segments are its documents, each without
the tokens that it shares with the document before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posttrain_lib.data.token_store import KINDS, TokenStore
from posttrain_lib.errors import DataError

#: shorter prefixes are not worth a segment of their own
LEAST_SHARED = 16


@dataclass(frozen=True)
class Units:
    """The units of a set of examples.

    Attributes:
        first: int64 [U], first example of each unit; its examples follow one another.
        count: int32 [U], how many.
        lengths: int32 [U], packed tokens.
        pairs: float64 [U], query-key pairs of causal attention, halves of the squares (see ``training.flops``).
        skipped: int32 [N], tokens of each example that its unit does not hold twice.
    """

    first: np.ndarray
    count: np.ndarray
    lengths: np.ndarray
    pairs: np.ndarray
    skipped: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def examples(self, units: np.ndarray) -> np.ndarray:
        """int64: the examples of ``units``, in order."""
        counts = self.count[units]
        if int(counts.sum()) == len(units):
            return self.first[units]
        starts = np.cumsum(counts) - counts
        return np.repeat(self.first[units] - starts, counts) + np.arange(int(counts.sum()))


def units_of(store: TokenStore, row_tokens: int, *, share_prefixes: bool) -> Units:
    """The units of a whole store, for rows of ``row_tokens``.

    Raises:
        DataError: an example, or a pair, is longer than a row; it is named.
    """
    skipped = store.shared if share_prefixes else np.zeros_like(store.shared)
    skipped = np.where(skipped >= LEAST_SHARED, skipped, 0).astype(np.int32)
    joined = (store.kinds == KINDS.index("pair")) & (_number_in_row(store) % 2 == 1)
    lengths = store.lengths - skipped
    starts = _starts((skipped > 0) | joined, joined, lengths, skipped, row_tokens)
    first = np.flatnonzero(starts)
    skipped = np.where(starts, 0, skipped).astype(np.int32)
    lengths = (store.lengths - skipped).astype(np.int64)
    # A segment of m tokens behind d shared ones: m * d + m^2 / 2.
    pairs = lengths * (skipped + lengths / 2.0)
    counts = np.diff(np.append(first, len(lengths))).astype(np.int32)
    empty = len(first) == 0
    total = np.zeros(0, np.int64) if empty else np.add.reduceat(lengths, first)
    too_long = np.flatnonzero(total > row_tokens)
    if len(too_long):
        unit = int(too_long[np.argmax(total[too_long])])
        _refuse(store, int(first[unit]), int(counts[unit]), int(total[unit]), row_tokens)
    return Units(
        first=first,
        count=counts,
        lengths=total.astype(np.int32),
        pairs=np.zeros(0) if empty else np.add.reduceat(pairs, first),
        skipped=skipped,
    )


def _number_in_row(store: TokenStore) -> np.ndarray:
    """int64 [N]: the examples of a row counted from 0."""
    n = len(store)
    if n == 0:
        return np.zeros(0, np.int64)
    new = np.ones(n, bool)
    for column in (store.source_index, store.file_index, store.row_index):
        new[1:] &= column[1:] == column[:-1]
    new[1:] = ~new[1:]
    starts = np.flatnonzero(new)
    return np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))


def _starts(
    joins: np.ndarray, must: np.ndarray, lengths: np.ndarray, skipped: np.ndarray, row_tokens: int
) -> np.ndarray:
    """bool [N]: whether an example begins a unit. One that would make its unit too long for a row begins the next."""
    starts = ~joins
    starts[:1] = True
    # Only examples that join need the loop: conversations whose template rewrites earlier turns.
    total = 0
    for example in np.flatnonzero(joins).tolist():
        if starts[example - 1]:
            total = int(lengths[example - 1]) + (int(skipped[example - 1]) if joins[example - 1] else 0)
        total += int(lengths[example])
        if total > row_tokens and not must[example]:
            starts[example] = True
    return starts


def _refuse(store: TokenStore, example: int, count: int, tokens: int, row_tokens: int) -> None:
    what = "an example is longer than a packed row" if count == 1 else "a pair is longer than a packed row"
    raise DataError(
        what,
        where=f"{store.folder}, row {store.row_id(example)}",
        got=f"{tokens} tokens",
        expected=f"at most {row_tokens} tokens (train.row_tokens)",
        fix="raise train.row_tokens, or lower data.max_example_tokens and prepare the data again",
    )
