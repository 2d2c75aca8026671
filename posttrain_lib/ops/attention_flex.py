"""Packed attention with a soft cap or sinks on CUDA: FlexAttention with a mask of blocks.

A query sees one run of keys, whatever the layout: documents, windows and shared beginnings only move its two ends. So
the table of tiles follows from the ends of runs alone: [T/128, U/128], never [T, U], and nothing is read back from the
device.

Mask, soft cap and sinks are tested on a CPU, where FlexAttention runs uncompiled and forward only. The compiled kernel
and its gradients run on a GPU alone: ``tests/gpu`` covers them, and no result of theirs was recorded yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

#: FlexAttention's own default; its kernels' tiles divide it
_BLOCK = 128


def key_runs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, window: int | None) -> tuple[Tensor, Tensor]:
    """(first, last) int32 [T]: the key places that each of T queries sees, both ends included.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [n+1], the segments on the two axes; the last query stands at the last key.
        window: keys that a query sees at most, its own included.
    """
    place = torch.arange(queries, dtype=torch.int32, device=cu_seqlens_q.device)
    segment = torch.searchsorted(cu_seqlens_q[1:].contiguous(), place, right=True)
    last = cu_seqlens_k[segment + 1] - (cu_seqlens_q[segment + 1] - place)
    first = cu_seqlens_k[segment]
    return (first if window is None else torch.maximum(first, last - (window - 1))), last


def block_mask(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, window: int | None) -> BlockMask:
    """The tiles of queries and keys to compute, and which of them need a look at every pair."""
    first, last = key_runs(cu_seqlens_q, cu_seqlens_k, queries, window)
    rows, columns = -(-queries // _BLOCK), -(-keys // _BLOCK)
    # every query opens its run of tiles and closes it behind the last: a tile is touched while some run is open
    edges = torch.zeros(rows, columns + 1, dtype=torch.int32, device=first.device)
    row = torch.arange(queries, device=first.device) // _BLOCK
    one = torch.ones_like(first)
    edges.index_put_((row, first // _BLOCK), one, accumulate=True)
    edges.index_put_((row, last // _BLOCK + 1), -one, accumulate=True)
    touched = edges.cumsum(1)[:, :-1] > 0
    # a tile's last query sees from furthest right on, its first query the least far; a tile cut by the row's end is
    # never full, as in create_block_mask
    starts = torch.arange(0, queries, _BLOCK, device=first.device)
    ends = (starts + (_BLOCK - 1)).clamp_(max=queries - 1)
    begin = torch.arange(columns, device=first.device) * _BLOCK
    full = (begin >= first[ends][:, None]) & (begin + (_BLOCK - 1) <= last[starts][:, None])
    full &= (starts + _BLOCK <= queries)[:, None]

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= last[query])

    return BlockMask.from_kv_blocks(
        *_ordered(touched & ~full), *_ordered(full), BLOCK_SIZE=_BLOCK, mask_mod=mask, seq_lengths=(queries, keys)
    )


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(count int32 [1, 1, rows], columns int32 [1, 1, rows, columns] with the marked ones first) of a bool table."""
    columns = tiles.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def attend_flex(
    query_TNH: Tensor,
    key_UKH: Tensor,
    value_UKV: Tensor,
    blocks: BlockMask,
    *,
    scale: float,
    softcap: float | None,
    sinks_N: Tensor | None,
    attend: Callable[..., Any] | None = None,
) -> Tensor:
    """[T, N, V]. ``attend``: another FlexAttention than the compiled one (a test's, on a CPU).

    The sinks' part follows from the log-sum-exp L, whose gradient FlexAttention has: exp L / (exp L + exp s) of the
    result is left.
    """
    out, aux = (attend or _compiled())(
        query_TNH.transpose(0, 1)[None],
        key_UKH.transpose(0, 1)[None],
        value_UKV.transpose(0, 1)[None],
        score_mod=None if softcap is None else _capped(softcap, query_TNH.shape[1], query_TNH.device),
        block_mask=blocks,
        scale=scale,
        enable_gqa=query_TNH.shape[1] != key_UKH.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks_N is not None:
        left = torch.sigmoid(aux.lse - sinks_N.to(aux.lse.dtype)[None, :, None])
        out = (out * left[..., None]).to(out.dtype)
    return out[0].transpose(0, 1)


@cache
def _compiled() -> Callable[..., Any]:
    """Compiled at its first use, for any lengths: tokens and tiles are symbols."""
    return torch.compile(flex_attention, dynamic=True)


@cache
def _capped(softcap: float, heads: int, device: torch.device) -> Callable[..., Tensor]:
    """One function per cap: another object for each call would be another graph.

    The number lies in a table by head. As a Python number it would become a symbol, for everything is one here, and
    the compiler has no code for such symbols within the kernel.
    """
    caps = torch.full((heads,), softcap, device=device)

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return caps[head] * torch.tanh(score / caps[head])

    return cap
