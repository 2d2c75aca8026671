"""What a loss is: a local sum, divided by nobody but the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.schema.batches import PackedBatch


@dataclass(frozen=True)
class LossOutput:
    """One micro-batch's share of a step.

    ``local_sum`` is a differentiable scalar, a sum and never a mean: the step divides by the global count, so that
    how rows are split over micro-batches and workers changes nothing. ``nll`` is float [N], detached: the unweighted
    negative log-likelihood at each supervised position, from which per-source losses are reported.
    """

    local_sum: Tensor
    nll: Tensor


class Loss(Protocol):
    """An objective. It must use every trained parameter even for a micro-batch without targets (a zero that belongs
    to the graph), because sharded training communicates in the backward.

    A loss may say in ``kind`` which examples it learns from (see ``data.token_store.KINDS``); without it, documents.
    """

    def divisor(self, batch: PackedBatch) -> float:
        """This batch's share of the global count that the step divides by; known before the forward."""
        ...

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """Run the model on the batch (torch tensors) and return the local sum."""
        ...
