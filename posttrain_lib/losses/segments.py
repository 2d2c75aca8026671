"""Sums over the documents of a packed batch, and which two of them make a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.losses.base import segments_of_tokens

if TYPE_CHECKING:
    from posttrain_lib.schema.batches import PackedBatch


def segment_sums(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """[n]: the sum of ``values_N`` over the supervised tokens of each segment, differentiable; 0 where it has none.

    A document's trained tokens all lie in its own segment: what it shares with the one before it is not trained.
    """
    sums = values_N.new_zeros(len(batch.document_ids))
    return sums.index_add(0, segments_of_tokens(batch), values_N)


def check_whole_documents(batch: PackedBatch) -> None:
    """Raises ConfigError where the batch is a rank's part of documents that lie over several."""
    if batch.prefixes is not None and batch.prefixes.exchange is not None:
        raise ConfigError(
            "the loss looks at whole documents, and these lie over several ranks",
            where="compute.mesh.context",
            expected="1",
            fix="set compute.mesh.context: 1; use shard and recomputation for long rows",
        )


def pair_signals(batch: PackedBatch) -> dict[str, Any]:
    """``{"chosen": int64 [P], "rejected": int64 [P]}``: the segments of the pairs of a batch (numpy). The two
    documents of a pair follow one another, the chosen first (see ``data.token_store``).

    Raises:
        DataError: the batch holds half of a pair, or documents that are no pairs.
        ConfigError: the batch is a rank's part of documents that lie over several.
    """
    check_whole_documents(batch)
    real = np.flatnonzero(batch.document_ids >= 0)
    chosen, rejected = real[0::2], real[1::2]
    if len(chosen) != len(rejected) or (batch.document_ids[chosen] + 1 != batch.document_ids[rejected]).any():
        raise DataError(
            "the batch does not hold whole pairs",
            got=f"documents {batch.document_ids[real].tolist()[:8]}",
            expected="chosen and rejected of each pair, one behind the other",
            fix="prepare the data from a source of pairs (data.sources.format: preference)",
        )
    return {"chosen": chosen.astype(np.int64), "rejected": rejected.astype(np.int64)}


def trained_pairs(batch: PackedBatch) -> dict[str, Any]:
    """As :func:`pair_signals`, without pairs of which neither document has a supervised token."""
    pairs = pair_signals(batch)
    segments = np.searchsorted(batch.cu_seqlens, batch.supervised_index, side="right") - 1
    counts = np.bincount(segments, minlength=len(batch.document_ids))
    trained = counts[pairs["chosen"]] + counts[pairs["rejected"]] > 0
    return {name: places[trained] for name, places in pairs.items()}


def supervised_counts(batch: PackedBatch) -> Tensor:
    """float [n]: the supervised tokens of each segment."""
    ones = torch.ones(len(batch.supervised_index), device=batch.loss_weights.device)
    return segment_sums(ones, batch)
