"""Causal attention over packed documents: packed equals alone, by construction.

Segments that continue another one (``schema.shared_prefix``) see the beginning of their document too. Their keys lie in
several places of the row; one gather lays context and own tokens of every segment end to end, and from there on each
path below works as before, with more keys than queries and the causal mask aligned to the last of both. The gathered
keys and values take as much room in each layer as the documents would without sharing, which for many branches of a
long prefix is many times the row; everything else of a shared token exists once.

Which path runs is decided by device and dtype alone, never by a flag read inside a model's forward:

* CUDA, half precision: ``torch.nn.attention.varlen.varlen_attn`` (FlashAttention with document boundaries, no mask),
  where this torch has it. It runs on a GPU only; the GPU suite covers it.
* everything else: ``scaled_dot_product_attention`` per document, in pieces where it needs a mask.

Why a plain loop on a CPU: sketches of the alternatives (an own autograd function over the same kernels, batched
matmuls per document, buckets of equal padded length with matmuls or with SDPA) gained little on short documents, and
those with matmuls lost on long ones. ``tests/benchmarks/ops.py`` times the loop beside the dense mask that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from posttrain_lib.schema.shared_prefix import SharedPrefixes

varlen_attn: Callable[..., Tensor] | None
try:
    from torch.nn.attention.varlen import varlen_attn  # type: ignore[assignment]
except ImportError:  # torch before 2.10
    varlen_attn = None


#: queries of a segment that go through one masked call. Without this, a segment of 512 after a context of 128 took a
#: sixth longer on a CPU (the kernel computes what a mask hides), and the mask of 4096 after 4096 is 128 MiB in float32.
_QUERIES = 256


@dataclass(frozen=True)
class DocumentLayout:
    """Where the documents of a packed row lie. Made once per forward, so that layers do not read a tensor again.

    ``cu_seqlens`` int32 [n+1] on the model's device; ``lengths`` the same as Python numbers, None where the fast path
    needs only the tensor (reading it back would stall a GPU). ``prefixes``, its arrays on the model's device too, is
    None where no segment continues another.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None
    prefixes: SharedPrefixes | None = None

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, max_seqlen: int, *, fused: bool = False, prefixes: SharedPrefixes | None = None
    ) -> DocumentLayout:
        """The layout of int32 ``cu_seqlens`` [n+1]; ``fused``: the row will go through ``varlen_attn``."""
        if prefixes is not None and prefixes.shares:
            return cls(cu_seqlens, max_seqlen, prefixes.lengths, prefixes)
        if fused:
            return cls(cu_seqlens, max_seqlen, None)
        return cls(cu_seqlens, max_seqlen, tuple(cu_seqlens.diff().tolist()))

    @property
    def longest(self) -> int:
        """Tokens of the longest document, shared beginning included."""
        return self.max_seqlen if self.prefixes is None else self.prefixes.max_path


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
        max_seqlen: longest segment, tokens.
        scale: factor on the query-key products.
        window: a token sees itself and ``window - 1`` tokens of its document before it; None = all before it.

    Returns:
        [T, N, H] in the dtype of the computation (autocast's where it is on).
    """
    dtype = attention_dtype(query_TNH)
    fused = has_fused_varlen(query_TNH.device, dtype)
    layout = cu_seqlens if isinstance(cu_seqlens, DocumentLayout) else DocumentLayout.of(cu_seqlens, max_seqlen)
    if window is not None and window >= layout.longest:
        window = None
    key, value, cu_seqlens_k = key_TKH, value_TKH, layout.cu_seqlens
    if layout.prefixes is not None:
        key, value = (_Gather.apply(rows.to(dtype), layout.prefixes.key_index) for rows in (key, value))
        cu_seqlens_k = layout.prefixes.cu_seqlens_k
    if fused and varlen_attn is not None:
        return varlen_attn(
            query_TNH.to(dtype),
            key.to(dtype),
            value.to(dtype),
            layout.cu_seqlens,
            cu_seqlens_k,
            layout.max_seqlen,
            layout.longest,
            scale=scale,
            # FlashAttention counts the tokens to the left of the query, the query itself not included. Where there are
            # more keys than queries (since its version 2.1) the last query stands at the last key.
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query_TNH.shape[1] != key.shape[1],
        )
    lengths = layout.lengths if layout.lengths is not None else tuple(layout.cu_seqlens.diff().tolist())
    key_lengths = lengths if layout.prefixes is None else layout.prefixes.key_lengths
    return _attend_each(query_TNH, key, value, lengths, key_lengths, scale, window)


class _Gather(torch.autograd.Function):
    """``rows[index]``, whose gradient adds what the copies of one row get in float32 at least: a prompt of many
    completions would lose most of their sum in bfloat16."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        """[T, ...] and int64 [U] -> [U, ...]."""
        ctx.save_for_backward(index)
        ctx.tokens = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[U, ...] -> [T, ...]."""
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros((ctx.tokens, *grad.shape[1:]), dtype=wide)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


def _attend_each(
    query_TNH: Tensor,
    key_UKH: Tensor,
    value_UKH: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    """Segment after segment; a mask only where one has a context or is longer than the window."""
    outputs = []
    for query, key, value in zip(
        query_TNH.split(lengths), key_UKH.split(key_lengths), value_UKH.split(key_lengths), strict=True
    ):
        length, keys = query.shape[0], key.shape[0]
        if keys == length and (window is None or length <= window):
            outputs.append(_attend(query, key, value, None, scale))
        else:
            outputs.extend(_attend_masked(query, key, value, scale, window))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Iterator[Tensor]:
    """The outputs of one segment, its last query at its last key, some queries at a time: those see no key after them
    nor any before their window, so that neither is computed, and a mask is small."""
    length, context = query.shape[0], key.shape[0] - query.shape[0]
    for begin in range(0, length, _QUERIES):
        end = min(begin + _QUERIES, length)
        first = 0 if window is None else max(0, context + begin + 1 - window)
        mask = _mask(end - begin, context + end - first, window, query.device)
        here = slice(first, context + end)
        yield _attend(query[begin:end], key[here], value[here], mask, scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One scaled_dot_product_attention, causal where there is no mask: [S, N, H] of S queries."""
    return scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )[0].transpose(0, 1)


def _mask(length: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, keys], True where the row's token sees the column's; the last row stands at the last column."""
    context = keys - length
    ones = torch.ones(length, keys, dtype=torch.bool, device=device).tril_(context)
    return ones if window is None else ones.triu_(context + 1 - window)
