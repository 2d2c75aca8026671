"""Attention of packed segments a few queries at a time, as plain products: what no fused kernel at hand can do.

A segment is a run of queries over a run of keys, the last query at the last key. ``pieces`` cuts both into runs short
enough that a table of queries times keys stays small, whatever the length of a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: queries of a segment that go through one masked call. Without this, a segment of 512 after a context of 128 took a
#: sixth longer on a CPU (the kernel computes what a mask hides), and the mask of 4096 after 4096 is 128 MiB in float32.
QUERIES = 256


@dataclass(frozen=True)
class Piece:
    """Some queries of a segment and the keys that any of them sees, as places on the two packed axes.

    ``plain``: as many keys as queries and no window between them, so that the causal mask is the usual one.
    """

    queries: slice
    keys: slice
    plain: bool

    def seen(self, window: int | None, device: torch.device) -> Tensor:
        """bool [queries, keys], True where the row's token sees the column's; the last of both are one token."""
        length, keys = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        ones = torch.ones(length, keys, dtype=torch.bool, device=device).tril_(keys - length)
        return ones if window is None else ones.triu_(keys - length + 1 - window)


def pieces(
    lengths: Sequence[int], key_lengths: Sequence[int], window: int | None, *, longest: int | None = None
) -> Iterator[Piece]:
    """The pieces of every segment, in order, none empty; together their queries are the whole packed axis.

    ``longest``: queries of a plain piece at most; None: a whole segment, for kernels that need no table.
    """
    start = key_start = 0
    for length, keys in zip(lengths, key_lengths, strict=True):
        end, key_end = start + length, key_start + keys
        whole = keys == length and (window is None or length <= window)
        if whole and length and (longest is None or length <= longest):
            yield Piece(slice(start, end), slice(key_start, key_end), plain=True)
        else:
            for begin in range(start, end, QUERIES):
                stop = min(begin + QUERIES, end)
                # the keys of the piece's first query begin a window before it, those of its last end at it
                first = key_start if window is None else max(key_start, key_end - (end - begin) + 1 - window)
                yield Piece(slice(begin, stop), slice(first, key_end - (end - stop)), plain=False)
        start, key_start = end, key_end


def scores_softmax(
    scores: Tensor, scale: float, softcap: float | None, hidden: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """From products to probabilities, in the order of transformers' Gemma-2 (``eager_attention_forward``): scale and
    soft cap in the products' dtype, softmax in float32 at least.

    Args:
        scores: [..., Q, U] query-key products; overwritten.
        hidden: bool, True where a query does not see the key; None where all see all.
        sinks: [..., 1], one more logit in every row of the softmax, or None.

    Returns:
        (probabilities [..., Q, U], or [..., Q, U+1] with the sink's last; tanh(scale * scores / softcap) or None).
    """
    scores, tanh = scores.mul_(scale), None
    if softcap is not None:
        tanh = scores.div_(softcap).tanh_()
        scores = tanh * softcap
    if hidden is not None:
        scores = scores.masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)), tanh


def attend_pieces(
    query_TNH: Tensor,
    key_UKH: Tensor,
    value_UKV: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """[T, N, V] by products, any device and dtype. Nothing of the size of a table is kept for the gradient: it is
    computed again. Segment i has ``lengths[i]`` of the T queries and ``key_lengths[i]`` of the U keys."""
    return _Products.apply(
        query_TNH, key_UKH, value_UKV, sinks_N, tuple(lengths), tuple(key_lengths), scale, window, softcap
    )


class _Products(torch.autograd.Function):
    """All segments of a row in one node, so that gradients of keys and values are summed once, in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        lengths: tuple[int, ...],
        key_lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """[T, N, V]."""
        ctx.save_for_backward(query, key, value, sinks)
        ctx.lengths, ctx.key_lengths = lengths, key_lengths
        ctx.scale, ctx.window, ctx.softcap = scale, window, softcap
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for piece in pieces(lengths, key_lengths, window, longest=QUERIES):
            here = _Heads.of(query[piece.queries], key[piece.keys])
            probabilities, _ = here.probabilities(piece, scale, window, softcap, sinks)
            mixed = torch.bmm(probabilities[..., : here.keys].to(value.dtype), value[piece.keys].transpose(0, 1))
            out[piece.queries] = here.unfold(mixed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and sinks."""
        query, key, value, sinks = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        for piece in pieces(ctx.lengths, ctx.key_lengths, ctx.window, longest=QUERIES):
            here = _Heads.of(query[piece.queries], key[piece.keys])
            probabilities, tanh = here.probabilities(piece, ctx.scale, ctx.window, ctx.softcap, sinks)
            seen = probabilities[..., : here.keys]
            pull = here.fold(grad_out[piece.queries])
            grad_value[piece.keys] += torch.bmm(seen.to(value.dtype).mT, pull).transpose(0, 1)
            grad_seen = torch.bmm(pull, value[piece.keys].permute(1, 2, 0)).to(wide)
            mean = (seen * grad_seen).sum(-1, keepdim=True)  # a sink adds nothing: it has no value
            if grad_sinks is not None:
                # heads lie group-fastest: key head, then its query heads
                grad_sinks -= (probabilities[..., here.keys :] * mean).view(grad_sinks.shape[0], -1).sum(1)
            grad_scores = grad_seen.sub_(mean).mul_(seen)
            if tanh is not None:
                grad_scores *= 1 - tanh.to(wide).square()
            grad_scores = (grad_scores * ctx.scale).to(query.dtype)
            grad_query[piece.queries] = here.unfold(torch.bmm(grad_scores, key[piece.keys].transpose(0, 1)))
            grad_key[piece.keys] += torch.bmm(grad_scores.mT, here.query).transpose(0, 1)
        grads = grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
        return (*grads, None if grad_sinks is None else grad_sinks.to(sinks.dtype), *[None] * 5)


@dataclass(frozen=True)
class _Heads:
    """Queries that share a key head as more queries of it: [K, G*Q, H] with G = N / K, so that keys are not copied."""

    query: Tensor
    key: Tensor
    queries: int
    keys: int

    @classmethod
    def of(cls, query_QNH: Tensor, key_UKH: Tensor) -> _Heads:
        """Of one piece's queries and keys."""
        heads = cls(query_QNH, key_UKH.permute(1, 2, 0), query_QNH.shape[0], key_UKH.shape[0])
        return cls(heads.fold(query_QNH), heads.key, heads.queries, heads.keys)

    def fold(self, rows_QNX: Tensor) -> Tensor:
        """[Q, N, X] -> [K, G*Q, X]."""
        return rows_QNX.unflatten(1, (self.key.shape[0], -1)).permute(1, 2, 0, 3).flatten(1, 2)

    def unfold(self, rows: Tensor) -> Tensor:
        """[K, G*Q, X] -> [Q, N, X]."""
        return rows.unflatten(1, (-1, self.queries)).permute(2, 0, 1, 3).flatten(1, 2)

    def probabilities(
        self, piece: Piece, scale: float, window: int | None, softcap: float | None, sinks_N: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``scores_softmax`` of this piece, both [K, G*Q, ...]."""
        scores = torch.bmm(self.query, self.key).unflatten(1, (-1, self.queries))
        sinks = None if sinks_N is None else sinks_N.view(*scores.shape[:2], 1, 1)
        probabilities, tanh = scores_softmax(scores, scale, softcap, ~piece.seen(window, scores.device), sinks)
        return probabilities.flatten(1, 2), None if tanh is None else tanh.flatten(1, 2)
