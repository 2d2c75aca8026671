"""Gradient norm and clipping over gradients that lie whole on every rank, or over any meshes of ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients, a float64 scalar on the gradients' device; the same bits on every rank.

    One collective, whatever meshes there are: each rank adds up the squares of what it holds, divided by the number of
    ranks that hold the same.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in _gradients(parameters):
        by_copies.setdefault(_copies(gradient), []).append(_own(gradient))
    total = torch.zeros((), dtype=torch.float64)
    for copies, own in by_copies.items():
        norms = torch.stack(list(torch._foreach_norm(own))).double()
        total = total.to(norms.device) + norms.square().sum() / copies
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale gradients so that their ``norm`` (as measured) is at most ``max_norm``; in place, without waiting."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in _gradients(parameters):
        by_dtype.setdefault(gradient.dtype, []).append(_own(gradient))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's own clipping
    for own in by_dtype.values():
        torch._foreach_mul_(own, factor.to(own[0].device))


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _own(gradient: Tensor) -> Tensor:
    """What this rank holds, the storage itself; empty where there are fewer rows than ranks."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _copies(gradient: Tensor) -> int:
    """How many ranks hold what this one does."""
    if not isinstance(gradient, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    mesh = gradient.device_mesh
    shards = 1
    for degree, placement in zip(mesh.shape, gradient.placements, strict=True):
        if placement.is_partial():
            raise ValueError(f"a gradient of shape {tuple(gradient.shape)} is a share of a sum: settle it first")
        shards *= 1 if placement.is_replicate() else degree
    return dist.get_world_size() // shards
