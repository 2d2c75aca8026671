"""The readable versions: dense, slow, obviously right. Tests hold the fast ones against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def packed_attention_reference(
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKV: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
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
    key, value = key_TKH.repeat_interleave(group, dim=1), value_TKV.repeat_interleave(group, dim=1)
    scores = torch.einsum("qnh,knh->nqk", query_TNH, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks_N is not None:
        scores = torch.cat([scores, sinks_N[:, None, None].expand(-1, tokens, 1)], dim=-1)
    return torch.einsum("nqk,knv->qnv", scores.softmax(-1)[..., :tokens], value)


def mixture_reference(
    hidden_TD: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    *,
    activation: Callable[[Tensor, Tensor], Tensor],
    gate_bias_EF: Tensor | None = None,
    up_bias_EF: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> Tensor:
    """``ops.experts.mixture``: every token through every expert, those not chosen with weight 0."""
    share_TE = hidden_TD.new_zeros(hidden_TD.shape[0], gate_EFD.shape[0])
    share_TE = share_TE.scatter_add(1, expert_ids_TK, expert_weights_TK.to(hidden_TD.dtype))
    gate = torch.einsum("td,efd->tef", hidden_TD, gate_EFD)
    up = torch.einsum("td,efd->tef", hidden_TD, up_EFD)
    gate = gate if gate_bias_EF is None else gate + gate_bias_EF
    up = up if up_bias_EF is None else up + up_bias_EF
    outputs = torch.einsum("tef,edf->ted", activation(gate, up), down_EDF)
    outputs = outputs if down_bias_ED is None else outputs + down_bias_ED
    return torch.einsum("te,ted->td", share_TE, outputs)


def short_convolution_reference(
    hidden_TC: Tensor,
    weight_CW: Tensor,
    lengths: Sequence[int],
    *,
    bias_C: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``ops.short_convolution.short_convolution`` with torch's convolution, one document at a time."""
    channels, taps = weight_CW.shape
    outputs, states = [], []
    for number, own in enumerate(hidden_TC.split(list(lengths))):
        before = hidden_TC.new_zeros(channels, taps - 1) if initial_state is None else initial_state[number]
        row = torch.cat((before, own.t()), 1)
        output = torch.nn.functional.conv1d(row[None], weight_CW[:, None], bias_C, groups=channels)[0].t()
        outputs.append(torch.nn.functional.silu(output) if activation == "silu" else output)
        states.append(row[:, len(own) :])
    return torch.cat(outputs), torch.stack(states)


def gated_delta_rule_reference(
    query_TNH: Tensor,
    key_TNH: Tensor,
    value_TNV: Tensor,
    log_decay_TN: Tensor,
    beta_TN: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    normalise: bool,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``ops.gated_delta.gated_delta_rule``, token after token, in the inputs' dtype."""
    if normalise:
        query_TNH, key_TNH = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query_TNH, key_TNH))
    outputs, states, begin = [], [], 0
    for number, length in enumerate(lengths):
        memory = value_TNV.new_zeros(*key_TNH.shape[1:], value_TNV.shape[-1])
        if initial_state is not None:
            memory = initial_state[number]
        for token in range(begin, begin + length):
            memory = memory * log_decay_TN[token].exp()[:, None, None]
            recalled = torch.einsum("nhv,nh->nv", memory, key_TNH[token])
            correction = beta_TN[token][:, None] * (value_TNV[token] - recalled)
            memory = memory + torch.einsum("nh,nv->nhv", key_TNH[token], correction)
            outputs.append(torch.einsum("nhv,nh->nv", memory, query_TNH[token] * scale))
        states.append(memory)
        begin += length
    return torch.stack(outputs), torch.stack(states)
