"""What a loss is: a local sum, divided by nobody but the training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain_lib.errors import ConfigError

if TYPE_CHECKING:
    from posttrain_lib.losses.beside import Beside
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.schema.batches import PackedBatch


@dataclass(frozen=True)
class LossOutput:
    """One micro-batch's share of a step.

    ``local_sum`` is a differentiable scalar, a sum and never a mean: the step divides by the global count, so that
    how rows are split over micro-batches and workers changes nothing.

    The held-out loss, the losses per source and the rows that an incident names come from M *items*, supervised tokens
    or pairs: ``values`` float [M], detached, the loss of each, unweighted; ``weights`` float [M]; ``segments`` int64
    [M], the segment of the batch that each belongs to. ``figures`` has for each name in ``Loss.figures`` a float64 [2],
    detached: (sum, weight) of what is reported as sum / weight over all micro-batches and ranks; ``extremes`` has for
    each name in ``Loss.extremes`` a float64 scalar of which the largest is reported.
    """

    local_sum: Tensor
    values: Tensor
    weights: Tensor
    segments: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    extremes: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_tokens(
        cls, local_sum: Tensor, values_N: Tensor, batch: PackedBatch, figures: Mapping[str, Tensor] | None = None
    ) -> LossOutput:
        """An output whose items are the supervised tokens [N] of ``batch`` with their loss weights."""
        weights_N = batch.loss_weights[batch.supervised_index]
        return cls(local_sum, values_N.detach(), weights_N, segments_of_tokens(batch), figures or {})


def segments_of_tokens(batch: PackedBatch) -> Tensor:
    """int64 [N]: the segment of each supervised token."""
    return torch.searchsorted(batch.cu_seqlens, batch.supervised_index.to(torch.int32), right=True) - 1


def weighted_figure(values: Tensor, weights: Tensor) -> Tensor:
    """Float64 [2]: what ``LossOutput.figures`` has of a mean of values with these weights, [M] each."""
    weights = weights.double()
    return torch.stack([values.detach().double() @ weights, weights.sum()])


class Loss(ABC):
    """An objective. It must use every trained parameter even for a micro-batch without targets (a zero that belongs
    to the graph), because sharded training communicates in the backward.

    Attributes:
        kind: the examples that it learns from, one of ``data.token_store.KINDS``.
        needs: the frozen model that it compares with, if any; see :meth:`attach`.
        wants_margins: whether it reads ``batch.margins``; data of which no pair has one is then refused.
        figures: names of what it reports besides its value, as ``rewards/margin``; ``extremes``: of which it reports
            the largest value, not the mean.
        beside: what :meth:`attach` was given.
    """

    kind: ClassVar[Literal["document", "pair", "prompt"]] = "document"
    needs: Literal["reference", "teacher"] | None = None
    wants_margins: bool = False
    figures: tuple[str, ...] = ()
    extremes: tuple[str, ...] = ()
    beside: Beside | None = None

    def attach(self, beside: Beside) -> None:
        """Take what stands beside the trained model, and keep it as ``beside``; called once before the first step of a
        loss with ``needs``."""
        raise NotImplementedError(f"{type(self).__name__} says that it needs a {self.needs}, and takes none")

    def signals(self, batch: PackedBatch, split: str) -> dict[str, Any]:
        """More arrays for a batch (numpy) of the split "train" or "held_out"; they become ``batch.signals``, tensors on
        the device. An array's first axis has one entry for each supervised token, or for each segment, or pair."""
        return {}

    @abstractmethod
    def divisor(self, batch: PackedBatch) -> float:
        """This batch's share of the global count that the step divides by; known before the forward."""

    @abstractmethod
    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """Run the model on the batch (torch tensors) and return the local sum."""


def run_loss(loss: Loss, model: Decoder, batch: PackedBatch) -> LossOutput:
    """The loss of a batch (torch tensors), held against what the loss says of itself.

    Raises:
        ConfigError: it returned something else, other figures than it names, or a sum that no gradient comes from.
    """
    output: object = loss(model, batch)
    name = f"{type(loss).__module__}:{type(loss).__qualname__}"
    if not isinstance(output, LossOutput):
        raise ConfigError(
            f"the loss {name} did not return a LossOutput",
            where="train.loss",
            got=type(output).__name__,
            expected="posttrain_lib.losses.base.LossOutput",
            fix="return LossOutput(local_sum, values, weights, segments), or LossOutput.of_tokens(...)",
        )
    for kind, found, said in (
        ("figures", output.figures, loss.figures),
        ("extremes", output.extremes, loss.extremes),
    ):
        if set(found) != set(said):
            raise ConfigError(
                f"the loss {name} did not return the {kind} that it names",
                where="train.loss",
                got=sorted(found),
                expected=sorted(said),
            )
    if torch.is_grad_enabled() and not output.local_sum.requires_grad:
        raise ConfigError(
            f"no gradient comes from what the loss {name} returned",
            where="train.loss",
            got="a detached local_sum",
            expected="a sum that belongs to the graph, also where nothing is trained: (hidden * 0).sum()",
        )
    return output


def check_option(name: str, value: object, holds: bool, expected: str) -> None:
    """Raises ConfigError where an option of a loss does not hold."""
    if not holds:
        raise ConfigError(
            "the loss does not take this value", where=f"train.loss_options.{name}", got=value, expected=expected
        )
