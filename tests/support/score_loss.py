"""A loss on the scores of whole documents, small enough to be read at a glance."""

from __future__ import annotations

import numpy as np

from posttrain_lib.losses.base import Loss, LossOutput
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.schema.batches import PackedBatch


class NearTwo(Loss):
    """Squares: every document is to score 2, which a fresh head does not give to any."""

    def divisor(self, batch: PackedBatch) -> float:
        return float((np.asarray(batch.document_ids) >= 0).sum())

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        real = (batch.document_ids >= 0).nonzero()[:, 0]
        ends = batch.cu_seqlens[1:].long()[real] - 1
        scores = model(
            batch.token_ids,
            batch.positions,
            batch.cu_seqlens,
            batch.max_seqlen,
            lambda hidden, head: head.logits(hidden[ends])[:, 0],
        ).float()
        values = (scores - 2.0).square()
        return LossOutput(values.sum(), values.detach(), values.new_ones(len(values)), real)
