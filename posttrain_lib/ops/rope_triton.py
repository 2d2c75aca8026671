"""Rotary position embedding on a GPU, as a Triton kernel: heads are read and written once, forward and backward alike.

The backward of a turn is the turn by the opposite angle. ``ops.rope`` is the same in torch, for everything else.
``TRITON_INTERPRET=1`` runs the kernel on a CPU's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Pairs that a program turns at a time: 8 per lane of 4 warps.
_PAIRS = 1024
_WARPS = 4


def apply_rope_kernel(heads_TNH: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool = False) -> Tensor:
    """:func:`posttrain_lib.ops.rope.apply_rope` of float32 or half precision, any strides; the result is contiguous.

    Forward it has the bits of the torch version: products and their sum are rounded one by one. Backward, torch rounds
    the two products of a half-precision input before it adds them, and this does not. The tables get no gradient.

    Args:
        cosine, sine: float32 [T, 1, dims/2], or of one row for all.
    """
    return _Rope.apply(heads_TNH, cosine, sine, interleaved)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.interleaved = interleaved
        return _turned(heads, cosine, sine, interleaved, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(grad, cosine, sine, ctx.interleaved, back=True), None, None, None


def _turned(heads: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, *, back: bool) -> Tensor:
    tokens, count, size = heads.shape
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    if out.numel() == 0:
        return out
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    half = cosine.shape[-1]
    cosine, sine = (table.contiguous().expand(tokens, 1, half) for table in (cosine, sine))
    pairs = triton.next_power_of_2(half)
    heads_at_once = min(triton.next_power_of_2(count), max(1, _PAIRS // pairs))
    tokens_at_once = max(1, _PAIRS // (pairs * heads_at_once))
    rest = size - 2 * half
    with torch.cuda.device_of(heads):
        _turn_kernel[(triton.cdiv(tokens, tokens_at_once), triton.cdiv(count, heads_at_once))](
            heads,
            out,
            cosine,
            sine,
            tokens,
            count,
            size,
            half,
            heads.stride(0),
            heads.stride(1),
            cosine.stride(0),
            sine.stride(0),
            INTERLEAVED=interleaved,
            BACK=back,
            TOKENS=tokens_at_once,
            HEADS=heads_at_once,
            PAIRS=pairs,
            REST=triton.next_power_of_2(rest) if rest else 0,
            num_warps=_WARPS,
            # a product and a sum in one instruction would be rounded once, where torch rounds twice
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _turn_kernel(
    heads,
    out,
    cosines,
    sines,
    tokens,
    count,
    size,
    half,
    token_stride,
    head_stride,
    cosine_stride,
    sine_stride,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
    pair = tl.arange(0, PAIRS)[None, None, :]
    source = heads + token * token_stride + head * head_stride
    target = out + (token * count + head) * size
    here = (token < tokens) & (head < count)

    in_table = (token < tokens) & (pair < half)
    cosine = tl.load(cosines + token * cosine_stride + pair, mask=in_table, other=0.0)
    sine = tl.load(sines + token * sine_stride + pair, mask=in_table, other=0.0)
    if BACK:
        sine = -sine

    if INTERLEAVED:
        at = tl.arange(0, 2 * PAIRS)[None, None, :]
        both = tl.load(source + at, mask=here & (at < 2 * half), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [TOKENS, HEADS, PAIRS, 2]))
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        turned = tl.reshape(turned, [TOKENS, HEADS, 2 * PAIRS]).to(out.dtype.element_ty)
        tl.store(target + at, turned, mask=here & (at < 2 * half))
    else:
        exists = here & (pair < half)
        first = tl.load(source + pair, mask=exists, other=0.0).to(tl.float32)
        second = tl.load(source + half + pair, mask=exists, other=0.0).to(tl.float32)
        tl.store(target + pair, (first * cosine - second * sine).to(out.dtype.element_ty), mask=exists)
        tl.store(target + half + pair, (second * cosine + first * sine).to(out.dtype.element_ty), mask=exists)

    if REST > 0:
        at = 2 * half + tl.arange(0, REST)[None, None, :]
        behind = here & (at < size)
        tl.store(target + at, tl.load(source + at, mask=behind), mask=behind)
