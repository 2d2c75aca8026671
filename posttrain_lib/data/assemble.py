"""Rows of units become a packed batch: where each segment goes, and its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from posttrain_lib.data.kernels import lay_out, nonzero, pad, place_rows
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.data.units import Units
from posttrain_lib.schema.batches import PackedBatch

#: longest document of padding
PADDING_TOKENS = 128


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
    """The arrays on T of a batch that is being filled: int32, int32, float32, int32."""

    token_ids: np.ndarray
    target_ids: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray

    @classmethod
    def empty(cls, total: int) -> PackedArrays:
        """Arrays [total] of whatever the memory holds, in one piece: numpy asks for huge pages from 4 MiB on, and page
        faults cost more here than copying."""
        block = np.empty((4, total), np.int32)
        return cls(block[0], block[1], block[2].view(np.float32), block[3])

    def pad(self, bounds: np.ndarray, segments: np.ndarray) -> None:
        """Make what no segment fills documents of zeros; see ``kernels.pad_plain``."""
        pad()(bounds, segments, self.token_ids, self.target_ids, self.loss_weights, self.positions)

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
    flat = np.fromiter(chain.from_iterable(rows), np.int64)
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


def assemble(segments: Segments, fill: Fill, row_tokens: int, rows_per_batch: int) -> list[PackedBatch]:
    """Lay the rows end to end and part them into batches of ``rows_per_batch``: T = rows * ``row_tokens`` in each.

    What a row leaves free becomes documents of its own behind the others, short ones (attention is quadratic), with
    positions from 0, weight 0 and source -1, so that they see no real token and none sees them. Weights move from the
    predicted token to the position that predicts it; that of a document's first token, which nothing predicts, falls
    away. The batches are views of common arrays.
    """
    rows = len(segments.per_row)
    bounds, order = place_rows()(segments.lengths, segments.per_row, row_tokens, PADDING_TOKENS)
    arrays = PackedArrays.empty(rows * row_tokens)
    fill(bounds[:-1][order >= 0], arrays)
    arrays.pad(bounds, order)
    whole = _Whole(
        arrays=arrays,
        bounds=bounds,
        # The -1 at the end is what an index of -1, padding, finds.
        sources=np.append(segments.sources, np.int32(-1))[order],
        ids=np.append(segments.examples, -1)[order],
        parents=_parents(segments.firsts, order) if segments.firsts.any() else None,
    )
    return [
        whole.part(first, min(rows, first + rows_per_batch), row_tokens) for first in range(0, rows, rows_per_batch)
    ]


@dataclass(frozen=True)
class _Whole:
    """All rows of a step: ``bounds`` int64 [n+1] of the segments, padding among them."""

    arrays: PackedArrays
    bounds: np.ndarray
    sources: np.ndarray
    ids: np.ndarray
    parents: np.ndarray | None

    def part(self, first: int, end: int, row_tokens: int) -> PackedBatch:
        """Rows ``first`` to ``end`` as a batch. Every row begins with a segment of its own and ends with one."""
        begin, stop = first * row_tokens, end * row_tokens
        left, right = np.searchsorted(self.bounds, (begin, stop))
        ids = self.ids[left:right]
        cu_seqlens = (self.bounds[left : right + 1] - begin).astype(np.int32)
        parents = None if self.parents is None else self.parents[left:right]
        if parents is not None:
            parents = None if (parents < 0).all() else np.where(parents < 0, -1, parents - left).astype(np.int32)
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        weights = self.arrays.loss_weights[begin:stop]
        supervised = np.empty(stop - begin, np.int32)
        return PackedBatch(
            token_ids=self.arrays.token_ids[begin:stop],
            target_ids=self.arrays.target_ids[begin:stop],
            loss_weights=weights,
            positions=self.arrays.positions[begin:stop],
            cu_seqlens=cu_seqlens,
            supervised_index=supervised[: nonzero()(weights, supervised)],
            document_sources=self.sources[left:right],
            document_ids=ids,
            max_seqlen=int(lengths.max()),
            real_tokens=int(lengths[ids >= 0].sum()),
            parents=parents,
        )


def _parents(firsts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int64: a segment with shared tokens goes on from the one before it; padding stands alone."""
    shares = np.append(firsts > 0, False)[order]
    return np.where(shares, np.arange(len(order)) - 1, -1)
