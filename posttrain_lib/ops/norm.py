"""RMS norm with Hugging Face's rounding: statistics in float32, the weight before or after the cast back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain_lib.ops.fused import fuses


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, late_cast: bool = False) -> Tensor:
    """``weight * (hidden / rms(hidden))`` over the last dimension, any leading shape.

    The normalised value is rounded to ``hidden``'s dtype before the weight multiplies it, as transformers'
    LlamaRMSNorm and its copies do; with ``late_cast`` after it, as its Olmo3RMSNorm does. ``plus_one``: the factor is
    1 + weight (Gemma2RMSNorm, with ``late_cast``; without it, the sum is rounded to the weight's dtype as well).
    Half precision is computed in float32; float64 stays float64. On a GPU a kernel does it in one pass.
    """
    if fuses(hidden, weight):
        from posttrain_lib.ops.norm_triton import MAX_COLUMNS, rms_norm_kernels

        if hidden.shape[-1] <= MAX_COLUMNS:
            return rms_norm_kernels(hidden, weight, eps, plus_one=plus_one, late_cast=late_cast)
    return _RMSNorm.apply(hidden, weight, eps, plus_one, late_cast)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a row for the backward, where autograd would keep four tensors of full size.

    ``tests/benchmarks/ops.py`` times both.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, plus_one: bool, late_cast: bool) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, inverse)
        ctx.plus_one = plus_one
        normed = wide * inverse
        factor = 1.0 + weight.to(wide.dtype) if plus_one else weight
        if late_cast:
            return (factor * normed).to(hidden.dtype)
        return factor.to(weight.dtype) * normed.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, inverse = ctx.saved_tensors
        normed = hidden.to(inverse.dtype) * inverse
        grad = grad.to(inverse.dtype)
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        # d normed / d hidden = inverse * (1 - normed normed^T / size)
        grad_normed = grad * (1.0 + weight.to(inverse.dtype) if ctx.plus_one else weight)
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_hidden = grad_normed.addcmul_(normed, along, value=-1).mul_(inverse)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None
