"""Random documents as packed rows and as padded batches: the same ones for every system of the training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posttrain_lib.data.assemble import PADDING_TOKENS
from posttrain_lib.data.packing import StreamingPacker
from posttrain_lib.schema.batches import PackedBatch

#: units that wait in the packer
BUFFER = 256


def documents_of(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """int32 token ids of documents of these lengths."""
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


def packed_rows(
    documents: Sequence[np.ndarray], row_tokens: int, wanted: int, share: float = 1.0, seed: int = 0
) -> list[PackedBatch]:
    """The last ``wanted`` rows that the project's packer makes of the documents before its buffer runs dry: the first
    ones have the longest documents of a full buffer. ``share`` of the targets are supervised."""
    packer = StreamingPacker(row_tokens, BUFFER)
    lengths = np.array([len(document) for document in documents], np.int32)
    _, rows = packer.feed(np.arange(len(documents)), lengths, len(documents))
    random = np.random.default_rng(seed)
    return [
        _row([(number, documents[number]) for number in row], row_tokens, share, random) for row in list(rows)[-wanted:]
    ]


def _row(
    members: Sequence[tuple[int, np.ndarray]], row_tokens: int, share: float, random: np.random.Generator
) -> PackedBatch:
    """One row; what no document fills becomes short documents of zeros, as the loader does it."""
    left = row_tokens - sum(len(tokens) for _, tokens in members)
    padding = [min(PADDING_TOKENS, left - start) for start in range(0, left, PADDING_TOKENS)]
    segments = [tokens for _, tokens in members] + [np.zeros(length, np.int32) for length in padding]
    real = len(members)
    targets = [np.append(tokens[1:], 0).astype(np.int32) for tokens in segments]
    weights = [np.append(np.ones(len(tokens) - 1), 0.0) for tokens in segments[:real]]
    weights += [np.zeros(len(tokens)) for tokens in segments[real:]]
    loss_weights = np.concatenate(weights).astype(np.float32)
    loss_weights *= random.random(row_tokens) < share
    lengths = [len(tokens) for tokens in segments]
    return PackedBatch(
        token_ids=np.concatenate(segments),
        target_ids=np.concatenate(targets),
        loss_weights=loss_weights,
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        cu_seqlens=np.array([0, *np.cumsum(lengths)], np.int32),
        supervised_index=np.flatnonzero(loss_weights).astype(np.int64),
        document_sources=np.array([0] * real + [-1] * len(padding), np.int32),
        document_ids=np.array([number for number, _ in members] + [-1] * len(padding), np.int64),
        max_seqlen=max(lengths),
        real_tokens=sum(lengths[:real]),
    )


def padded_batches(documents: Sequence[np.ndarray], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, attention mask), int64 [documents, longest] each, in the order of the documents."""
    batches = []
    for start in range(0, len(documents), size):
        part = documents[start : start + size]
        longest = max(len(document) for document in part)
        ids, mask = (np.zeros((len(part), longest), np.int64) for _ in range(2))
        for place, document in enumerate(part):
            ids[place, : len(document)] = document
            mask[place, : len(document)] = 1
        batches.append((ids, mask))
    return batches
