"""Causal attention over packed documents: packed equals alone, by construction.

Which path runs is decided by device and dtype alone, never by a flag read inside a model's forward:

* CUDA, half precision: ``torch.nn.attention.varlen.varlen_attn`` (FlashAttention with document boundaries, no mask),
  where this torch has it. It runs on a GPU only; the GPU suite covers it.
* everything else: one ``scaled_dot_product_attention`` call per document.

Why a plain loop on a CPU: sketches of the alternatives (an own autograd function over the same kernels, batched
matmuls per document, buckets of equal padded length with matmuls or with SDPA) gained little on short documents, and
those with matmuls lost on long ones. ``tests/benchmarks/ops.py`` times the loop beside the dense mask that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

varlen_attn: Callable[..., Tensor] | None
try:
    from torch.nn.attention.varlen import varlen_attn  # type: ignore[assignment]
except ImportError:  # torch before 2.10
    varlen_attn = None


@dataclass(frozen=True)
class DocumentLayout:
    """Where the documents of a packed row lie. Made once per forward, so that layers do not read a tensor again.

    ``cu_seqlens`` int32 [n+1] on the model's device; ``lengths`` the same as Python numbers, None where the fast path
    needs only the tensor (reading it back would stall a GPU).
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None

    @classmethod
    def of(cls, cu_seqlens: Tensor, max_seqlen: int, *, fused: bool = False) -> DocumentLayout:
        """The layout of int32 ``cu_seqlens`` [n+1]; ``fused``: the row will go through ``varlen_attn``."""
        if fused:
            return cls(cu_seqlens, max_seqlen, None)
        return cls(cu_seqlens, max_seqlen, tuple(cu_seqlens.diff().tolist()))


def has_fused_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed attention on this device and dtype goes through ``varlen_attn``."""
    return varlen_attn is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def attention_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that attention computes in for ``tensor``: autocast's where it is on."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def packed_attention(
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKH: Tensor,
    cu_seqlens: Tensor | DocumentLayout,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each document, none across documents.

    Args:
        query_TNH: [T, N, H]. key_TKH, value_TKH: [T, K, H]; K divides N, query heads share key heads in runs of N/K.
        cu_seqlens: int32 [n+1], first 0, last T; or the layout made of it.
        max_seqlen: longest document, tokens.
        scale: factor on the query-key products.
        window: a token sees itself and ``window - 1`` tokens before it; None = all before it.

    Returns:
        [T, N, H] in the dtype of the computation (autocast's where it is on).
    """
    dtype = attention_dtype(query_TNH)
    fused = has_fused_varlen(query_TNH.device, dtype)
    layout = cu_seqlens if isinstance(cu_seqlens, DocumentLayout) else DocumentLayout.of(cu_seqlens, max_seqlen)
    if window is not None and window >= layout.max_seqlen:
        window = None
    if fused and varlen_attn is not None:
        return varlen_attn(
            query_TNH.to(dtype),
            key_TKH.to(dtype),
            value_TKH.to(dtype),
            layout.cu_seqlens,
            layout.cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            scale=scale,
            # FlashAttention counts the tokens to the left of the query, the query itself not included.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query_TNH.shape[1] != key_TKH.shape[1],
        )
    lengths = layout.lengths if layout.lengths is not None else tuple(layout.cu_seqlens.diff().tolist())
    return _attend_each(query_TNH, key_TKH, value_TKH, lengths, scale, window)


def _attend_each(
    query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """One scaled_dot_product_attention per document; a banded mask only for documents longer than the window."""
    grouped = query_TNH.shape[1] != key_TKH.shape[1]
    outputs = []
    for query, key, value in zip(
        query_TNH.split(lengths), key_TKH.split(lengths), value_TKH.split(lengths), strict=True
    ):
        length = query.shape[0]
        band = None if window is None or length <= window else _band(length, window, query.device)
        outputs.append(
            scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                key.transpose(0, 1)[None],
                value.transpose(0, 1)[None],
                attn_mask=band,
                is_causal=band is None,
                scale=scale,
                enable_gqa=grouped,
            )[0].transpose(0, 1)
        )
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length], True where the row's token sees the column's."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril_().triu_(1 - window)
