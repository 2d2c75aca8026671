"""Supervised fine-tuning: weighted negative log-likelihood of the trained tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from posttrain_lib.losses.base import Loss, LossOutput, check_option, weighted_figure
from posttrain_lib.ops.head_regularised import linear_regularised_cross_entropy
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch


class SFTLoss(Loss):
    """``sum_t w_t * -log p(target_t)``, to be divided by the global ``sum_t w_t``.

    The options add to each token's loss, under its weight, what ``ops.head_regularised`` says; the held-out loss then
    has it too, and the figures ``nll``, ``log_z`` and ``entropy`` (nats, weighted means) have its parts.

    Args:
        label_smoothing: 0 to below 1. z_loss: 0 or more; PaLM has 1e-4. entropy_bonus: 0 or more.

    Raises:
        ConfigError: an option outside its range.
    """

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0, entropy_bonus: float = 0.0) -> None:
        check_option("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "0 to below 1")
        check_option("z_loss", z_loss, z_loss >= 0, "0 or more")
        check_option("entropy_bonus", entropy_bonus, entropy_bonus >= 0, "0 or more")
        self.options: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "entropy_bonus": entropy_bonus,
        }
        self.regularised = any(self.options.values())
        if self.regularised:
            self.figures = ("nll", "log_z", "entropy") if entropy_bonus else ("nll", "log_z")

    def divisor(self, batch: PackedBatch) -> float:
        """Sum of the loss weights."""
        return batch.weight

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """One forward; logits exist only in chunks of supervised rows, inside the head."""

        def output(hidden_TD: Tensor, head: OutputHead) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            targets = (batch.target_ids, batch.loss_weights, batch.supervised_index)
            if self.regularised:
                return linear_regularised_cross_entropy(hidden_TD, head, *targets, **self.options)
            return (*linear_cross_entropy(hidden_TD, head, *targets), {})

        local_sum, values, parts = model(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, output, prefixes=batch.prefixes
        )
        weights = batch.loss_weights[batch.supervised_index]
        figures = {name: weighted_figure(part, weights) for name, part in parts.items()}
        return LossOutput.of_tokens(local_sum, values, batch, figures)
