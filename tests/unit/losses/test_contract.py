"""Every loss of the registry keeps the laws, and the check notices losses that do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from posttrain_lib.losses import LOSSES, build_loss
from posttrain_lib.losses.base import Loss, LossOutput
from posttrain_lib.losses.contract import check_loss
from posttrain_lib.losses.dpo import DPOLoss
from posttrain_lib.losses.pair_objectives import OBJECTIVES, SMOOTHED
from posttrain_lib.losses.sft import SFTLoss
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.schema.batches import PackedBatch
from tests.support.score_decoder import score_decoder

MORE = [
    ("sft", {"label_smoothing": 0.1, "z_loss": 1e-2, "entropy_bonus": 0.1}),
    *(("dpo", {"variant": name, "label_smoothing": 0.1 if name in SMOOTHED else 0.0}) for name in OBJECTIVES),
    ("dpo", {"sft_weight": 0.5, "length_normalise": True}),
    ("simpo", {"sft_weight": 0.5}),
    ("kto", {"baseline": 0.3, "desirable_weight": 2.0}),
    ("reward", {"centre": 0.1}),
]


#: what "policy" learns from comes with a rollout and not with examples: test_policy.py holds it to the contract
OF_EXAMPLES = [name for name in LOSSES if name != "policy"]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in OF_EXAMPLES), *MORE], ids=str)
def test_a_registered_loss_keeps_the_laws(name: str, options: dict) -> None:
    check_loss(build_loss(name, options), score_decoder() if name == "reward" else None)


class MeanOfTheBatch(SFTLoss):
    """Divides by its own count."""

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        output = super().__call__(model, batch)
        return dataclasses.replace(output, local_sum=output.local_sum / max(1, len(output.values)))


class Detached(SFTLoss):
    """Leaves the graph where there is nothing to train on."""

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        output = super().__call__(model, batch)
        return output if len(output.values) else dataclasses.replace(output, local_sum=torch.zeros(()))


class CountsTokens(DPOLoss):
    """Divides a loss of pairs by something that padding has too."""

    def divisor(self, batch: PackedBatch) -> float:
        return float(batch.num_tokens)


class ForgetsTheReference(DPOLoss):
    """Its margin is the policy's alone."""

    def reference_logprobs(self, model: Decoder, batch: PackedBatch) -> torch.Tensor:
        return super().reference_logprobs(model, batch) * 0


class UnnamedFigure(SFTLoss):
    """Reports what it did not announce."""

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        output = super().__call__(model, batch)
        return dataclasses.replace(output, figures={"extra": torch.zeros(2, dtype=torch.float64)})


class ProductInHalf(SFTLoss):
    """Sums by a product, which autocast makes in bfloat16."""

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        output = super().__call__(model, batch)
        if not len(output.values):
            return output
        graph = output.local_sum
        total = output.values.to(graph.dtype) @ output.weights.to(graph.dtype)
        return dataclasses.replace(output, local_sum=(graph - graph.detach()).to(total.dtype) + total)


class RoundedSum(ProductInHalf):
    """And makes a float32 of it again."""

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        output = super().__call__(model, batch)
        rounded = output.local_sum.to(torch.promote_types(output.local_sum.dtype, torch.float32))
        return dataclasses.replace(output, local_sum=rounded)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (MeanOfTheBatch(), "all in one row: loss"),
        (Detached(), "scalar of the graph"),
        (CountsTokens(), "all in one row: loss"),
        (ForgetsTheReference(), "the reference is the policy"),
        (UnnamedFigure(), "announced"),
        (ProductInHalf(), "half a precision"),
        (RoundedSum(), "its items' sum"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Loss) else "",
)
def test_a_loss_that_breaks_a_law_is_told_which(loss: Loss, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_loss(loss)
