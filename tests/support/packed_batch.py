"""Packed batches of random tokens as the loader makes them, out of trees of segments (``oracles.prefix_tree``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain_lib.schema.batches import PackedBatch
from tests.oracles.prefix_tree import Segment, row_of


def plain(*lengths: int) -> list[Segment]:
    """Whole documents of these lengths."""
    return [(-1, 0, length) for length in lengths]


def batch_of(tree: Sequence[Segment], total: int = 0, *, vocabulary: int | None = None) -> PackedBatch:
    """One row of the tree's segments, the rest up to ``total`` tokens a document of padding. Half of the tokens are
    trained, with weight 0.5; sources go round three. Without a vocabulary a token's id is its place."""
    used = sum(length for _, _, length in tree)
    padded = [*tree, (-1, 0, total - used)] if total > used else list(tree)
    bounds, positions, parents = (array.numpy() for array in row_of(padded))
    tokens, number = int(bounds[-1]), np.arange(len(padded))
    real = number < len(tree)
    random = np.random.default_rng(tokens + len(tree))
    weights = ((random.random(tokens) < 0.5) * 0.5).astype(np.float32)
    weights[used:] = 0
    places = np.arange(tokens, dtype=np.int32)
    ids = places if vocabulary is None else random.integers(0, vocabulary, tokens).astype(np.int32)
    return PackedBatch(
        token_ids=ids,
        target_ids=np.roll(ids, -1),
        loss_weights=weights,
        positions=positions.astype(np.int32),
        cu_seqlens=bounds,
        supervised_index=np.flatnonzero(weights).astype(np.int32),
        document_sources=np.where(real, number % 3, -1).astype(np.int32),
        document_ids=np.where(real, number, -1),
        max_seqlen=int(np.diff(bounds).max()),
        real_tokens=used,
        parents=parents if (parents >= 0).any() else None,
    )


def two_rows(one: PackedBatch, other: PackedBatch) -> PackedBatch:
    """Both end to end in one micro-batch; of whole documents."""
    assert one.parents is None and other.parents is None
    joined = {
        name: np.concatenate([getattr(one, name), getattr(other, name)])
        for name in ("token_ids", "target_ids", "loss_weights", "positions", "document_sources", "document_ids")
    }
    bounds = np.concatenate([one.cu_seqlens, other.cu_seqlens[1:] + one.num_tokens]).astype(np.int32)
    supervised = np.concatenate([one.supervised_index, other.supervised_index + one.num_tokens]).astype(np.int32)
    longest = max(one.max_seqlen, other.max_seqlen)
    real = one.real_tokens + other.real_tokens
    return PackedBatch(**joined, cu_seqlens=bounds, supervised_index=supervised, max_seqlen=longest, real_tokens=real)
