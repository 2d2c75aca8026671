"""RMS norm with Hugging Face's rounding: statistics in float32, cast back, then the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (hidden / rms(hidden))`` over the last dimension, any leading shape.

    The normalised value is rounded to ``hidden``'s dtype before the weight multiplies it, as transformers'
    LlamaRMSNorm and its Qwen copies do. Half precision is computed in float32; float64 stays float64.
    """
    return _RMSNorm.apply(hidden, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a row for the backward, where autograd would keep four tensors of full size.

    ``tests/benchmarks/ops.py`` times both.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, inverse)
        return weight * (wide * inverse).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, inverse = ctx.saved_tensors
        normed = hidden.to(inverse.dtype) * inverse
        grad = grad.to(inverse.dtype)
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        # d normed / d hidden = inverse * (1 - normed normed^T / size)
        grad_normed = grad * weight
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_hidden = grad_normed.addcmul_(normed, along, value=-1).mul_(inverse)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None
