"""Rows of units become a packed batch: where each segment goes, and its tokens."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from posttrain_lib.data.kernels import lay_out, nonzero, pad, place_rows
from posttrain_lib.data.packing import Rows
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.data.units import Units
from posttrain_lib.schema.batches import PackedBatch

#: longest document of padding
PADDING_TOKENS = 128


@dataclass(frozen=True)
class Segments:
    """The segments of some rows, in order: documents without the tokens that they share with the one before.

    ``examples`` int64 [n] ids; ``lengths`` int32 [n] tokens of the segment; ``firsts`` int32 [n] tokens shared before
    it; ``sources`` int32 [n]; ``per_row`` int64 [rows] segments of each row; ``margins`` float32 [n], NaN where not
    said, or None: of none.
    """

    examples: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    sources: np.ndarray
    per_row: np.ndarray
    margins: np.ndarray | None = None


class _Blocks:
    """Memory that steps are laid out in, used again when nobody holds a view of it any more: fresh pages cost as much
    as copying the tokens into them."""

    KEPT = 4  # one in work, some handed out
    IDLE = 2  # references to a block that only ``_blocks`` holds, as getrefcount's caller sees them

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[np.ndarray] = []

    def take(self, shape: tuple[int, int]) -> np.ndarray:
        """An int32 array of whatever the memory holds. Every view of it, a torch tensor's too, keeps it from others."""
        with self._lock:
            for number in range(len(self._blocks)):
                if self._blocks[number].shape == shape and sys.getrefcount(self._blocks[number]) == self.IDLE:
                    return self._blocks[number]
            block = np.empty(shape, np.int32)
            self._blocks = [block, *self._blocks][: self.KEPT]
            return block


_BLOCKS = _Blocks()


@dataclass(frozen=True)
class PackedArrays:
    """The arrays on T of a batch that is being filled: int32, int32, float32, int32; and int32 room for an index."""

    token_ids: np.ndarray
    target_ids: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    supervised: np.ndarray

    @classmethod
    def empty(cls, total: int) -> PackedArrays:
        """Arrays [total] of whatever the memory holds, views of one block."""
        block = _BLOCKS.take((5, total))
        return cls(block[0], block[1], block[2].view(np.float32), block[3], block[4])

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


def segments_of(store: TokenStore, units: Units, rows: Rows) -> Segments:
    """The segments of rows of unit ids."""
    examples = units.examples(rows.units)
    skipped = units.skipped[examples]
    per_row = rows.counts
    if len(examples) > len(rows.units):  # units of several segments
        row_of_unit = np.repeat(np.arange(len(rows)), per_row)
        per_row = np.bincount(row_of_unit, weights=units.count[rows.units], minlength=len(rows)).astype(np.int64)
    margins = None if store.margins is None else store.margins[examples]
    return Segments(
        examples, store.lengths[examples] - skipped, skipped, store.source_index[examples], per_row, margins
    )


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
    ids = np.append(segments.examples, -1)[order]  # the -1 at the end is what an index of -1, padding, finds
    sources = np.append(segments.sources, np.int32(-1))[order]
    parents = _parents(segments.firsts, order) if segments.firsts.any() else None
    margins = None if segments.margins is None else np.append(segments.margins, np.float32(np.nan))[order]
    lengths = np.diff(bounds)
    # Every row begins with a segment of its own and ends with one.
    stops = [*range(0, rows * row_tokens, rows_per_batch * row_tokens), rows * row_tokens]
    cuts = np.searchsorted(bounds, stops)
    longest = np.maximum.reduceat(lengths, cuts[:-1]).tolist()
    real = np.add.reduceat(np.where(ids >= 0, lengths, 0), cuts[:-1]).tolist()
    batches = []
    for number, ((begin, stop), (left, right)) in enumerate(zip(pairwise(stops), pairwise(cuts.tolist()), strict=True)):
        weights, supervised = arrays.loss_weights[begin:stop], arrays.supervised[begin:stop]
        batches.append(
            PackedBatch(
                token_ids=arrays.token_ids[begin:stop],
                target_ids=arrays.target_ids[begin:stop],
                loss_weights=weights,
                positions=arrays.positions[begin:stop],
                cu_seqlens=(bounds[left : right + 1] - begin).astype(np.int32),
                supervised_index=supervised[: nonzero()(weights, supervised)],
                document_sources=sources[left:right],
                document_ids=ids[left:right],
                max_seqlen=longest[number],
                real_tokens=real[number],
                parents=None if parents is None else _within(parents, left, right),
                margins=None if margins is None else _said(margins[left:right]),
            )
        )
    return batches


def _said(margins: np.ndarray) -> np.ndarray | None:
    return None if np.isnan(margins).all() else margins


def _within(parents: np.ndarray, left: int, right: int) -> np.ndarray | None:
    """int32: the parents of segments ``left`` to ``right`` counted from the first of these; None: no one has any."""
    own = parents[left:right]
    return None if (own < 0).all() else np.where(own < 0, -1, own - left).astype(np.int32)


def _parents(firsts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int64: a segment with shared tokens goes on from the one before it; padding stands alone."""
    shares = np.append(firsts > 0, False)[order]
    return np.where(shares, np.arange(len(order)) - 1, -1)
