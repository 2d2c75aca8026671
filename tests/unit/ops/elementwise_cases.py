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


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *fixed: Tensor, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """The result and the gradients in the inputs, for a pull whose last dimension is not contiguous.

    ``rounded``: the pull's numbers are those of this dtype; None: of the result's.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    result = function(*leaves, *fixed)
    numbers = torch.randn(result.shape[::-1], generator=torch.Generator().manual_seed(9))
    numbers = numbers.to(result.dtype if rounded is None else rounded)
    pull = numbers.to(result.device, result.dtype).permute(*range(result.ndim)[::-1])
    return [result.detach(), *torch.autograd.grad(result, leaves, pull)]


def in_float64(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *fixed: Tensor, rounded: torch.dtype
) -> list[Tensor]:
    """The exact result and gradients of the same numbers, for the same pull."""
    wide = [[tensor.double() for tensor in some] for some in (inputs, fixed)]
    return with_gradients(function, wide[0], *wide[1], rounded=rounded)


def assert_near(found: Sequence[Tensor], exact: Sequence[Tensor], roundings: int, through: torch.dtype) -> None:
    """Within so many units of the dtype's last place at each tensor's largest entry, or 64 of float32's for its sums.

    ``through``: the dtype that the result was rounded to on its way, which its own may be wider than.
    """
    units = 64 if through == torch.float32 else roundings
    for number, (one, other) in enumerate(zip(found, exact, strict=True)):
        assert one.shape == other.shape
        allowed = units * torch.finfo(through).eps * float(other.abs().max())
        worst = float((one.double() - other.double()).abs().max())
        assert worst <= allowed, f"tensor {number}: off by {worst:.3g}, allowed {allowed:.3g}"
