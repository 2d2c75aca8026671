"""Norms, turns and gated activations to compare in two ways of computing them, on whatever device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: (the dtype of the input, that of the weight, a whole row's shape, how the norm rounds)
NORMS = [
    (torch.float32, torch.float32, (7, 40), {}),
    (torch.float32, torch.float32, (3, 5, 16), {"plus_one": True, "late_cast": True}),
    (torch.bfloat16, torch.float32, (3, 5, 16), {}),
    (torch.bfloat16, torch.bfloat16, (7, 40), {"plus_one": True}),
    (torch.bfloat16, torch.bfloat16, (1, 33), {"late_cast": True}),
    (torch.float16, torch.float16, (2, 3, 2, 8), {"plus_one": True, "late_cast": True}),
]
#: (shape of the heads, entries that turn, whether neighbours are pairs)
TURNS = [((5, 3, 16), 16, False), ((5, 3, 16), 16, True), ((6, 1, 20), 12, False), ((4, 9, 24), 8, True)]


def strided(shape: Sequence[int], dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    """Normal numbers as a part of a wider tensor, as a projection's is that is split: a leaf's view."""
    numbers = torch.randn((*shape[:-1], shape[-1] + 8), generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, dtype)[..., : shape[-1]]


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], *fixed: Tensor) -> list[Tensor]:
    """The result and the gradients in the inputs, for a pull whose last dimension is not contiguous."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    result = function(*leaves, *fixed)
    numbers = torch.randn(result.shape[::-1], generator=torch.Generator().manual_seed(9))
    pull = numbers.to(result.device, result.dtype).permute(*range(result.ndim)[::-1])
    return [result.detach(), *torch.autograd.grad(result, leaves, pull)]


def in_float64(function: Callable[..., Tensor], inputs: Sequence[Tensor], *fixed: Tensor) -> list[Tensor]:
    """The same numbers' exact result and gradients; the pull is rounded as that of ``inputs`` would be."""
    return with_gradients(function, [tensor.double() for tensor in inputs], *(tensor.double() for tensor in fixed))
