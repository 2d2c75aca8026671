"""The readable versions: dense, slow, obviously right. Tests hold the fast ones against them."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_attention_reference(
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKH: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """``ops.attention.packed_attention`` with one dense [T, T] mask. Same arguments and result."""
    tokens, heads, _ = query_TNH.shape
    place = torch.arange(tokens, device=query_TNH.device)
    document = torch.bucketize(place, cu_seqlens[1:].to(place.dtype), right=True)
    distance = place[:, None] - place[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    group = heads // key_TKH.shape[1]
    key, value = key_TKH.repeat_interleave(group, dim=1), value_TKH.repeat_interleave(group, dim=1)
    scores = torch.einsum("qnh,knh->nqk", query_TNH, key) * scale
    return torch.einsum("nqk,knh->qnh", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def token_logprobs_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    index_N: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(logprobs_N, entropy_N) through the full logits, differentiable."""
    logits = (hidden_TD @ weight_VD.t())[:, :vocab_size] / temperature
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(1, target_ids_T[:, None]).squeeze(1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return picked[index_N], entropy[index_N]


def linear_cross_entropy_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    loss_weights_T: Tensor,
    supervised_index_N: Tensor,
    *,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``ops.linear_cross_entropy.linear_cross_entropy`` through the full logits. Same arguments and result."""
    picked, _ = token_logprobs_reference(hidden_TD, weight_VD, target_ids_T, supervised_index_N, vocab_size=vocab_size)
    return -(picked * loss_weights_T[supervised_index_N]).sum(), -picked.detach()
