"""Gradient norm over sharded and whole gradients alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients, a float scalar; over all ranks where they are sharded (a collective)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale gradients so that their ``norm`` (as measured) is at most ``max_norm``; in place, without waiting."""
    kept = [parameter for parameter in parameters if parameter.grad is not None]
    with torch.no_grad():
        clip_grads_with_norm_(kept, max_norm, norm)
