"""Rows of units become a packed batch: where each segment goes, and its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from posttrain_lib.data.kernels import lay_out
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.data.units import Units
from posttrain_lib.schema.batches import PackedBatch


@dataclass(frozen=True)
class Segments:
    """The segments of some rows, in order: documents without the tokens that they share with the one before.

    ``examples`` int64 [n] ids; ``lengths`` int32 [n] tokens of the segment; ``firsts`` int32 [n] tokens shared before
    it; ``sources`` int32 [n]; ``per_row`` int64 [rows] segments of each row.
    """

    examples: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    sources: np.ndarray
    per_row: np.ndarray


@dataclass(frozen=True)
class PackedArrays:
    """The arrays on T of a batch that is being filled: int32, int32, float32, int32, zeros to begin with."""

    token_ids: np.ndarray
    target_ids: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray

    @classmethod
    def empty(cls, total: int) -> PackedArrays:
        """Zeros [total]."""
        return cls(*(np.zeros(total, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32)))

    def lay_out(
        self,
        tokens: np.ndarray,
        weights: np.ndarray,
        begins: np.ndarray,
        lengths: np.ndarray,
        firsts: np.ndarray,
        places: np.ndarray,
    ) -> None:
        """Copy segments to their places; see ``kernels.lay_out_plain``."""
        lay_out()(
            tokens, weights, begins, lengths, firsts, places,
            self.token_ids, self.target_ids, self.loss_weights, self.positions,
        )  # fmt: skip


#: (places int64 [n], the arrays to fill) -> None: copies each segment to its place
Fill = Callable[[np.ndarray, PackedArrays], None]


def segments_of(store: TokenStore, units: Units, rows: Sequence[Sequence[int]]) -> Segments:
    """The segments of rows of unit ids."""
    flat = np.fromiter((unit for row in rows for unit in row), np.int64)
    examples = units.examples(flat)
    skipped = units.skipped[examples]
    row_of_unit = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    per_row = np.bincount(row_of_unit, weights=units.count[flat], minlength=len(rows)).astype(np.int64)
    return Segments(examples, store.lengths[examples] - skipped, skipped, store.source_index[examples], per_row)


def store_filler(store: TokenStore, segments: Segments) -> Fill:
    """Copies the segments out of the store's mapped files."""

    def fill(places: np.ndarray, into: PackedArrays) -> None:
        for chosen, shard, numbers in store.shards_of(segments.examples):
            begins = shard.offsets[numbers].astype(np.int64) + segments.firsts[chosen]
            into.lay_out(
                shard.tokens, shard.weights, begins, segments.lengths[chosen], segments.firsts[chosen], places[chosen]
            )

    return fill


def assemble(segments: Segments, fill: Fill, row_tokens: int) -> PackedBatch:
    """Lay the rows end to end: T = rows * ``row_tokens``.

    What a row leaves free becomes a last document of the row, with positions from 0, weight 0 and source -1, so that
    it sees no real token and none sees it. Weights move from the predicted token to the position that predicts it;
    that of a document's first token, which nothing predicts, falls away.
    """
    rows, n = len(segments.per_row), len(segments.examples)
    total = rows * row_tokens
    row_of = np.repeat(np.arange(rows), segments.per_row)
    before = np.cumsum(segments.lengths, dtype=np.int64) - segments.lengths
    used = np.bincount(row_of, weights=segments.lengths, minlength=rows).astype(np.int64)
    places = row_of * row_tokens + before - (np.cumsum(used) - used)[row_of]
    arrays = PackedArrays.empty(total)
    fill(places, arrays)
    free = np.flatnonzero(used < row_tokens)
    padding = free * row_tokens + used[free]
    for begin, end in zip(padding.tolist(), ((free + 1) * row_tokens).tolist(), strict=True):
        arrays.positions[begin:end] = np.arange(end - begin, dtype=np.int32)
    starts = np.concatenate([places, padding])
    order = np.argsort(starts)
    cu_seqlens = np.append(starts[order], total).astype(np.int32)
    padded = np.full(len(padding), -1)
    return PackedBatch(
        token_ids=arrays.token_ids,
        target_ids=arrays.target_ids,
        loss_weights=arrays.loss_weights,
        positions=arrays.positions,
        cu_seqlens=cu_seqlens,
        supervised_index=np.flatnonzero(arrays.loss_weights).astype(np.int64, copy=False),
        document_sources=np.concatenate([segments.sources, padded])[order].astype(np.int32),
        document_ids=np.concatenate([segments.examples, padded])[order].astype(np.int64),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        real_tokens=int(segments.lengths.sum(dtype=np.int64)),
        parents=_parents(segments.firsts, order, n) if segments.firsts.any() else None,
    )


def _parents(firsts: np.ndarray, order: np.ndarray, n: int) -> np.ndarray:
    """int32: a segment with shared tokens goes on from the one before it; padding stands alone."""
    shares = np.append(firsts > 0, np.zeros(len(order) - n, bool))[order]
    return np.where(shares, np.arange(len(order)) - 1, -1).astype(np.int32)
