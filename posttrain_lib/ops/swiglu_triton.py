"""Gated activations on a GPU, as Triton kernels: gate and up are read once, forward and backward.

Only gate and up are kept for the backward, which forms the activation and its slope anew. ``ops.swiglu`` is the same in
torch, for everything else. ``TRITON_INTERPRET=1`` runs the kernels on a CPU's tensors.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries that a program takes: 16 per lane of 4 warps.
_BLOCK = 2048
_WARPS = 4


def gated(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu_tanh", "gelu"]) -> Tensor:
    """``activation(gate) * up`` of two tensors of one shape and dtype, float32 or half precision.

    The activation is rounded to the dtype before it multiplies, as torch does; exponentials and quotients are the
    device's fast ones, so that it may differ in float32's last bits, and with it, rarely, a rounding to half precision.
    The gradient of ``gate`` is rounded once, where torch rounds the product of ``up`` and its gradient as well.
    """
    return _Gated.apply(gate, up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty_like(gate)
        if out.numel():
            with torch.cuda.device_of(gate):
                _forward_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
                    gate, up, out, out.numel(), ACTIVATION=activation, BLOCK=_BLOCK, num_warps=_WARPS
                )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        if grad.numel():
            with torch.cuda.device_of(gate):
                _backward_kernel[(triton.cdiv(grad.numel(), _BLOCK),)](
                    gate,
                    up,
                    grad,
                    grad_gate,
                    grad_up,
                    grad.numel(),
                    ACTIVATION=ctx.activation,
                    BLOCK=_BLOCK,
                    num_warps=_WARPS,
                )
        return grad_gate, grad_up, None


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    """(activation, its slope), float32. What of it is not used is not computed."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-gate))
        active = gate / (1.0 + tl.exp(-gate))
        slope = share * (1.0 + gate * (1.0 - share))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh x) / 2 is the logistic function of 2 x, and loses nothing where tanh is near -1
        twice = 2.0 * 0.7978845608028654  # sqrt(2 / pi)
        square = gate * gate
        share = 1.0 / (1.0 + tl.exp(-twice * (gate + 0.044715 * square * gate)))
        active = gate * share
        slope = share + gate * share * (1.0 - share) * twice * (1.0 + 3.0 * 0.044715 * square)
    else:
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # sqrt(1 / 2)
        active = gate * share
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)  # 1 / sqrt(2 pi)
    return active, slope


@triton.jit
def _forward_kernel(gates, ups, out, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    gate = tl.load(gates + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(ups + at, mask=here, other=0.0).to(tl.float32)
    active = _activated(gate, ACTIVATION)[0].to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (active * up).to(out.dtype.element_ty), mask=here)


@triton.jit
def _backward_kernel(gates, ups, grads, grad_gates, grad_ups, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    gate = tl.load(gates + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(ups + at, mask=here, other=0.0).to(tl.float32)
    grad = tl.load(grads + at, mask=here, other=0.0).to(tl.float32)
    active, slope = _activated(gate, ACTIVATION)
    active = active.to(ups.dtype.element_ty).to(tl.float32)
    tl.store(grad_ups + at, (grad * active).to(ups.dtype.element_ty), mask=here)
    tl.store(grad_gates + at, (grad * up * slope).to(gates.dtype.element_ty), mask=here)
