"""Supervised fine-tuning: weighted negative log-likelihood of the trained tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from posttrain_lib.losses.base import Loss, LossOutput
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch


class SFTLoss(Loss):
    """``sum_t w_t * -log p(target_t)``, to be divided by the global ``sum_t w_t``."""

    def divisor(self, batch: PackedBatch) -> float:
        """Sum of the loss weights."""
        return batch.weight

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """One forward; logits exist only in chunks of supervised rows, inside the head."""

        def output(hidden_TD: Tensor, head: OutputHead) -> tuple[Tensor, Tensor]:
            return linear_cross_entropy(hidden_TD, head, batch.target_ids, batch.loss_weights, batch.supervised_index)

        local_sum, nll = model(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, output, prefixes=batch.prefixes
        )
        return LossOutput.of_tokens(local_sum, nll, batch)
