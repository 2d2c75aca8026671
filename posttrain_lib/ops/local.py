"""What a rank holds of a weight that is laid over ranks, for operations that work on plain tensors."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def local(weight: Tensor, *, partial: bool = False) -> Tensor:
    """The rank's own part of a sharded weight, or all of a replicated one; any other tensor as it is.

    ``partial``: the rank's gradient is a share of the sum over ranks, as that of a weight is which every rank applies
    to heads of its own.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial()] if partial else None)
