"""Attention with sinks on a CPU, from the fused kernel's log-sum-exp.

A sink (gpt-oss; Xiao et al. 2023, learned as one logit per head) takes part in the softmax and has no value. With L the
log-sum-exp of a query's scores and s the sink, the whole normaliser is L' = log(exp L + exp s); so the fused result is
scaled by exp(L - L'). The kernel's backward computes each probability as exp(score - L) and subtracts the mean of the
incoming gradient that it takes from the result: given L' and the scaled result, it returns the gradients of the
attention with its sink, exactly, and the sink's own is minus its probability times that mean.

Scores, sinks and sums are float32 at least, where transformers' ``gpt_oss`` rounds scores and probabilities to the
model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain_lib.ops.attention_pieces import Piece, pieces

# The operators behind scaled_dot_product_attention on a CPU. That function keeps the log-sum-exp to itself.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_with_sinks(
    query_TNH: Tensor,
    key_UKH: Tensor,
    value_UKH: Tensor,
    sinks_N: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """[T, N, H] on a CPU; values as wide as keys. Segment i has ``lengths[i]`` of the T queries and ``key_lengths[i]``
    of the U keys, the last query at the last key."""
    return _Sinks.apply(query_TNH, key_UKH, value_UKH, sinks_N, tuple(lengths), tuple(key_lengths), scale, window)


class _Sinks(torch.autograd.Function):
    """All segments of a row in one node, so that gradients of keys and values are summed once, in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        lengths: tuple[int, ...],
        key_lengths: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        """[T, N, H]."""
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty_like(query)
        norms_TN = query.new_empty(query.shape[:2], dtype=wide)
        for piece in pieces(lengths, key_lengths, window):
            mixed, norm = _forward(
                *(_heads_first(rows) for rows in (query[piece.queries], key[piece.keys], value[piece.keys])),
                is_causal=piece.plain,
                attn_mask=_bias(piece, window, query),
                scale=scale,
            )
            out[piece.queries], norms_TN[piece.queries] = mixed[0].transpose(0, 1), norm[0].t()
        total_TN = torch.logaddexp(norms_TN, sinks.to(wide))
        out.mul_(norms_TN.sub_(total_TN).exp_()[..., None])
        ctx.save_for_backward(query, key, value, sinks, out, total_TN)
        ctx.lengths, ctx.key_lengths, ctx.scale, ctx.window = lengths, key_lengths, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and sinks."""
        query, key, value, sinks, out, total_TN = ctx.saved_tensors
        wide = total_TN.dtype
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for piece in pieces(ctx.lengths, ctx.key_lengths, ctx.window):
            here = piece.queries
            grads = _backward(
                *(_heads_first(rows) for rows in (grad_out[here], query[here], key[piece.keys], value[piece.keys])),
                _heads_first(out[here]),
                total_TN[here].t()[None],
                0.0,
                piece.plain,
                attn_mask=_bias(piece, ctx.window, query),
                scale=ctx.scale,
            )
            grad_query[here] = grads[0][0].transpose(0, 1)
            grad_key[piece.keys] += grads[1][0].transpose(0, 1)
            grad_value[piece.keys] += grads[2][0].transpose(0, 1)
        mean_TN = (grad_out.to(wide) * out.to(wide)).sum(-1)
        grad_sinks = -((sinks.to(wide) - total_TN).exp_() * mean_TN).sum(0)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks.to(sinks.dtype), *[None] * 4


def _heads_first(rows_SNH: Tensor) -> Tensor:
    """[S, N, H] -> [1, N, S, H], a view."""
    return rows_SNH.transpose(0, 1)[None]


def _bias(piece: Piece, window: int | None, like: Tensor) -> Tensor | None:
    """What the kernel adds to the scores, [queries, keys] in its dtype; None where ``is_causal`` says it."""
    if piece.plain:
        return None
    seen = piece.seen(window, like.device)
    return like.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
