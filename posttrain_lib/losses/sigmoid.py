"""Weighted binary classification of single tokens: was this token, here, a good one?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from posttrain_lib.losses.base import Loss, LossOutput, segments_of_tokens, weighted_figure
from posttrain_lib.ops.target_logits import target_logits

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch


class SigmoidLoss(Loss):
    """``sum_t |w_t| * -(y_t log s(l_t) + (1 - y_t) log s(-l_t))``, to be divided by the global ``sum_t |w_t|``, with s
    the logistic function and l_t the target's logit: the other tokens of the vocabulary do not compete with it.

    For feedback on tokens that were shown, as on items of a recommendation: the size of a token's weight is that of its
    reward, the label y_t is 1 for a positive weight and 0 for a negative one. A token store holds no negative weights:
    from one, labels come as the signal ``label``, float [N] from 0 to 1, of a subclass's :meth:`signals`, and stand in
    for the signs. Without any negative, all logits only rise.

    Figures, weighted means: ``probability`` of the tokens, ``accuracy`` (``l_t > 0`` where ``y_t > 1/2``) and
    ``positives``, the mean label.
    """

    figures = ("probability", "accuracy", "positives")

    def divisor(self, batch: PackedBatch) -> float:
        """Sum of the weights' sizes."""
        return float(abs(batch.loss_weights).astype("float64").sum())

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """One forward; one row of the head per supervised token."""

        def output(hidden_TD: Tensor, head: OutputHead) -> Tensor:
            return target_logits(hidden_TD, head, batch.target_ids, batch.supervised_index)

        logits = model(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, output, prefixes=batch.prefixes
        )
        signed = batch.loss_weights[batch.supervised_index].to(logits.dtype)
        weights = signed.abs()
        labels = batch.signals["label"].to(logits.dtype) if "label" in batch.signals else (signed > 0).to(logits.dtype)
        values = binary_cross_entropy_with_logits(logits, labels, reduction="none")
        found = logits.detach()
        means = (found.sigmoid(), ((found > 0) == (labels > 0.5)).to(weights.dtype), labels)
        figures = {name: weighted_figure(mean, weights) for name, mean in zip(self.figures, means, strict=True)}
        # Not a product: autocast would round both sides and their sum to 8 bits.
        return LossOutput((values * weights).sum(), values.detach(), weights, segments_of_tokens(batch), figures)
