"""Causal attention over packed documents: packed equals alone, by construction.

Segments that continue another one (``schema.shared_prefix``) see the beginning of their document too. Their keys lie in
several places of the row; one gather lays context and own tokens of every segment end to end, and from there on each
path below works as before, with more keys than queries and the causal mask aligned to the last of both. The gathered
keys and values take as much room in each layer as the documents would without sharing, which for many branches of a
long prefix is many times the row; everything else of a shared token exists once. Where ranks share a row's tokens, the
beginning of a segment's document may lie on other ranks: those keys are exchanged first (``attention_exchange``).

Which path runs is decided by device, dtype and what the family's attention has, never by a flag read inside a model's
forward:

* CUDA, half precision: ``torch.nn.attention.varlen.varlen_attn`` (FlashAttention with document boundaries, no mask),
  where this torch has it; with a soft cap or sinks FlexAttention (``attention_flex``). Both run on a GPU only; the GPU
  suite covers them.
* a CPU, sinks without a soft cap: the fused kernel and its log-sum-exp (``attention_sinks``).
* everything else: ``scaled_dot_product_attention`` per document, in pieces where it needs a mask; with a soft cap or
  sinks products per document in pieces (``attention_pieces``).

Why a plain loop on a CPU: sketches of the alternatives (an own autograd function over the same kernels, batched
matmuls per document, buckets of equal padded length with matmuls or with SDPA) gained little on short documents, and
those with matmuls lost on long ones. ``tests/benchmarks/ops.py`` times the loop beside the dense mask that it replaces.

Values narrower than keys (latent attention) are padded with zeros for the kernels that want one width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from posttrain_lib.ops.attention_exchange import exchanged_keys
from posttrain_lib.ops.attention_pieces import attend_pieces, pieces
from posttrain_lib.ops.attention_sinks import attend_with_sinks

if TYPE_CHECKING:
    from posttrain_lib.ops.cache import KeyValueCache
    from posttrain_lib.schema.shared_prefix import SharedPrefixes


@functools.cache
def _varlen_attn() -> Callable[..., Tensor] | None:
    """torch's packed attention, from 2.10 on. Imported where it can run: it brings torch's whole compiler along."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast("Callable[..., Tensor]", varlen_attn)


@functools.cache
def _must_tell_shared_heads() -> bool:
    """Up to torch 2.11 the kernel shares key heads without being told; from 2.12 on it must be told."""
    attention = _varlen_attn()
    return attention is not None and "enable_gqa" in inspect.signature(attention).parameters


#: what torch calls the vector units of an x86 CPU that has none for half precision
_NO_HALF = ("DEFAULT", "NO AVX", "AVX2")


@dataclass(frozen=True)
class KeySegments:
    """The runs of keys that a layout's segments see, end to end on an axis of their own.

    ``cu_seqlens`` int32 [n+1] on the model's device; ``lengths`` as Python numbers, None where nobody on the host needs
    them; ``longest`` keys of a segment.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...] | None
    longest: int
    #: FlexAttention's tables by window, the same in every layer
    blocks: dict[int | None, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class DocumentLayout:
    """Where the documents of a packed row lie. Made once per forward, so that layers do not read a tensor again.

    ``cu_seqlens`` int32 [n+1] on the model's device; ``lengths`` the same as Python numbers, None where the fast path
    needs only the tensor (reading it back would stall a GPU). ``prefixes``, its arrays on the model's device too, is
    None where no segment continues another. ``cache``: what generation keeps of earlier tokens, None in training; each
    segment then holds the new tokens of the cache's sequence of the same number, and blocks attend through it.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None
    prefixes: SharedPrefixes | None = None
    cache: KeyValueCache | None = None

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        max_seqlen: int,
        *,
        fused: bool = False,
        prefixes: SharedPrefixes | None = None,
        cache: KeyValueCache | None = None,
    ) -> DocumentLayout:
        """The layout of int32 ``cu_seqlens`` [n+1]; ``fused``: the row will go through CUDA's fused kernels."""
        if prefixes is not None and prefixes.shares:
            if cache is not None:
                raise ValueError("a cache holds whole sequences: segments with a shared beginning cannot use one")
            return cls(cu_seqlens, max_seqlen, prefixes.lengths, prefixes)
        # a cache writes to places that the host knows
        if fused and cache is None:
            return cls(cu_seqlens, max_seqlen, None)
        return cls(cu_seqlens, max_seqlen, tuple(cu_seqlens.diff().tolist()), cache=cache)

    @cached_property
    def keys(self) -> KeySegments:
        """The keys of this row's own tokens: the segments themselves, or their paths where some share a beginning."""
        if self.prefixes is None:
            return KeySegments(self.cu_seqlens, self.lengths, self.max_seqlen)
        return KeySegments(self.prefixes.cu_seqlens_k, self.prefixes.key_lengths, self.prefixes.max_path)

    def host_lengths(self) -> tuple[int, ...]:
        """Tokens of each segment; read from the device where the layout was made without."""
        return self.lengths if self.lengths is not None else tuple(self.cu_seqlens.diff().tolist())


def has_fused_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed attention on this device and dtype goes through ``varlen_attn``."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _varlen_attn() is not None


def attention_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that attention computes in for ``tensor``: autocast's where it is on."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def has_arithmetic(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has instructions for the dtype.

    CPUs without AVX-512 convert each number of half precision for each product: attention in float32, from inputs of
    half precision and rounded at the end, is finer and faster. It keeps float32 copies of them for the gradient.
    """
    return device.type != "cpu" or dtype.itemsize > 2 or torch.backends.cpu.get_cpu_capability() not in _NO_HALF


def packed_attention(
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKV: Tensor,
    cu_seqlens: Tensor | DocumentLayout,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Causal attention within each document, none across documents.

    Args:
        query_TNH: [T, N, H]. key_TKH: [T, K, H]; K divides N, query heads share key heads in runs of N/K.
        value_TKV: [T, K, V]; V need not be H.
        cu_seqlens: int32 [n+1], first 0, last T; or the layout made of it.
        max_seqlen: longest segment, tokens.
        scale: factor on the query-key products.
        window: a token sees itself and ``window - 1`` tokens of its document before it; None = all before it.
        softcap: scaled products s become ``softcap * tanh(s / softcap)`` before the mask (Gemma-2).
        sinks_N: one logit per query head that takes part in the softmax and has no value (gpt-oss). It gets a gradient.

    Returns:
        [T, N, V] in the dtype of the computation (autocast's where it is on).

    Half precision is at least as fine as transformers' own: where products are formed in it, scores and cap are rounded
    and the softmax is float32, as in its Gemma-2; fused kernels and a CPU without such arithmetic (``has_arithmetic``)
    keep scores in float32, where its Gemma-2 and gpt-oss round scores, and the latter probabilities too.
    """
    layout = cu_seqlens if isinstance(cu_seqlens, DocumentLayout) else DocumentLayout.of(cu_seqlens, max_seqlen)
    dtype = attention_dtype(query_TNH)
    query, key, value = (rows.to(dtype) for rows in (query_TNH, key_TKH, value_TKV))
    prefixes = layout.prefixes
    if prefixes is not None and prefixes.exchange is not None:
        key, value = exchanged_keys(key, value, prefixes.key_index, prefixes.exchange)
    elif prefixes is not None:
        key, value = (_Gather.apply(rows, prefixes.key_index) for rows in (key, value))
    return attend(query, key, value, layout, layout.keys, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)


def attend(
    query_TNH: Tensor,
    key_UKH: Tensor,
    value_UKV: Tensor,
    layout: DocumentLayout,
    segments: KeySegments,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """[T, N, V]: the layout's runs of queries over their ``segments`` of keys, the last query at the last key; all of
    one dtype. ``packed_attention`` says the rest."""
    if window is not None and window >= segments.longest:
        window = None
    if not has_arithmetic(query_TNH.device, query_TNH.dtype):
        query, key, value = query_TNH.float(), key_UKH.float(), value_UKV.float()
        with torch.autocast("cpu", enabled=False):  # it would round them again
            out = attend(
                query, key, value, layout, segments, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N
            )
        return out.to(query_TNH.dtype)
    plain = softcap is None and sinks_N is None
    if has_fused_varlen(query_TNH.device, query_TNH.dtype):
        if plain:
            one_width = _one_width(query_TNH, key_UKH, value_UKV)
            return _attend_varlen(*one_width, layout, segments, scale, window)[..., : value_UKV.shape[-1]]
        return _attend_flex(query_TNH, key_UKH, value_UKV, layout, segments, scale, window, softcap, sinks_N)
    lengths = layout.host_lengths()
    key_lengths = segments.lengths if segments.lengths is not None else tuple(segments.cu_seqlens.diff().tolist())
    on_cpu = query_TNH.device.type == "cpu"
    if softcap is None and (sinks_N is None or on_cpu):
        rows = _one_width(query_TNH, key_UKH, value_UKV)
        if sinks_N is None:
            out = _attend_each(*rows, lengths, key_lengths, scale, window)
        else:
            out = attend_with_sinks(*rows, sinks_N, lengths, key_lengths, scale=scale, window=window)
        return out[..., : value_UKV.shape[-1]]
    inputs = query_TNH, key_UKH, value_UKV, lengths, key_lengths
    return attend_pieces(*inputs, scale=scale, window=window, softcap=softcap, sinks_N=sinks_N)


def _one_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with zeros behind the narrower of keys and values: fused kernels know one head dim. Without this, a CPU
    falls back to a table of all pairs."""
    more = key.shape[-1] - value.shape[-1]
    if more >= 0:
        return query, key, pad(value, (0, more)) if more else value
    return pad(query, (0, -more)), pad(key, (0, -more)), value


def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DocumentLayout,
    segments: KeySegments,
    scale: float,
    window: int | None,
) -> Tensor:
    """[T, N, H] through FlashAttention with document boundaries."""
    attention = _varlen_attn()
    assert attention is not None
    told = {"enable_gqa": query.shape[1] != key.shape[1]} if _must_tell_shared_heads() else {}
    return attention(
        query,
        key,
        value,
        layout.cu_seqlens,
        segments.cu_seqlens,
        layout.max_seqlen,
        segments.longest,
        scale=scale,
        # FlashAttention counts the tokens to the left of the query, the query itself not included. Where there are
        # more keys than queries (since its version 2.1) the last query stands at the last key.
        window_size=(-1 if window is None else window - 1, 0),
        **told,
    )


def _attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DocumentLayout,
    segments: KeySegments,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[T, N, V] through FlexAttention; its table is made once per window and forward."""
    from posttrain_lib.ops.attention_flex import attend_flex, block_mask  # pulls in the compiler

    if window not in segments.blocks:
        queries, keys = query.shape[0], key.shape[0]
        segments.blocks[window] = block_mask(layout.cu_seqlens, segments.cu_seqlens, queries, keys, window)
    return attend_flex(query, key, value, segments.blocks[window], scale=scale, softcap=softcap, sinks_N=sinks)


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
    # split, not slices of the row: their gradients would each be a row of zeros with one segment in it
    for query, key, value in zip(
        query_TNH.split(lengths), key_UKH.split(key_lengths), value_UKH.split(key_lengths), strict=True
    ):
        for piece in pieces((query.shape[0],), (key.shape[0],), window):
            mask = None if piece.plain else piece.seen(window, query.device)
            outputs.append(_attend_one(query[piece.queries], key[piece.keys], value[piece.keys], mask, scale))
    # no queries at all: an empty result that still has a gradient
    return outputs[0] if len(outputs) == 1 else torch.cat([query_TNH[:0], *outputs])


def _attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
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
