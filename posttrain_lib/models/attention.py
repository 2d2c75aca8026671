"""Softmax attention of every family: grouped-query, and DeepSeek's out of a latent.

T packed tokens, D hidden, N query heads, K key/value heads, H head dim. Under tensor parallelism a rank holds a share
of the heads, so that their number is read off the projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain_lib.models.norm import RMSNorm
from posttrain_lib.models.spec import AttentionConfig, DecoderConfig, LatentAttentionConfig, RopeConfig
from posttrain_lib.ops.attention import DocumentLayout, packed_attention
from posttrain_lib.ops.local import local
from posttrain_lib.ops.rope import apply_rope

#: (cosine, sine) of each of the decoder's rotary embeddings
RopeTables = tuple[tuple[Tensor, Tensor], ...]


class Rotary:
    """One of the decoder's rotary embeddings, as a layer uses it; no module, for it has no weights."""

    def __init__(self, config: DecoderConfig, rope: RopeConfig | None) -> None:
        self.number = None if rope is None else config.ropes.index(rope)
        self.interleaved = rope is not None and rope.interleaved

    def __call__(self, heads_TNH: Tensor, tables: RopeTables) -> Tensor:
        """Turn [T, N, H] by the token's position; as it is where the layer has no positions."""
        if self.number is None:
            return heads_TNH
        return apply_rope(heads_TNH, *tables[self.number], interleaved=self.interleaved)


class Attention(nn.Module):
    """Grouped-query causal attention within documents."""

    def __init__(self, config: DecoderConfig, own: AttentionConfig, layer: int) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, own.head_dim
        self.own, self.layer, self.head_dim = own, layer, head_dim
        self.rotary = Rotary(config, own.rope)
        queries, keys = own.num_attention_heads * head_dim, own.num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden, queries * (2 if own.gated else 1), bias=own.qkv_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=own.qkv_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=own.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=own.o_bias)
        # Identity would put a module into the tree that no checkpoint names; None does not.
        per_head = own.qk_norm == "head"
        self.q_norm = RMSNorm(head_dim if per_head else queries, config.norm) if own.qk_norm else None
        self.k_norm = RMSNorm(head_dim if per_head else keys, config.norm) if own.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(own.num_attention_heads)) if own.sinks else None

    def forward(self, hidden_TD: Tensor, tables: RopeTables, layout: DocumentLayout) -> Tensor:
        """[T, D] -> [T, D]."""
        own = self.own
        query, gate = self._query(hidden_TD)
        key, value = self.k_proj(hidden_TD), self.v_proj(hidden_TD)
        if own.qk_norm == "projection":
            query, key = self._normed(query, key)
        if own.clip is not None:
            query, key, value = (part.clamp(-own.clip, own.clip) for part in (query, key, value))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
        if own.qk_norm == "head" and not own.qk_norm_after_rope:
            query, key = self._normed(query, key)
        query, key = self.rotary(query, tables), self.rotary(key, tables)
        if own.qk_norm == "head" and own.qk_norm_after_rope:
            query, key = self._normed(query, key)
        sinks = None if self.sinks is None else local(self.sinks)
        mixed = attend(self, query, key, value, layout, sinks).flatten(-2)
        return self.o_proj(mixed if gate is None else mixed * torch.sigmoid(gate))

    def _query(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """([T, N * H], the same of the gate or None): each head's gate lies behind its query."""
        query = self.q_proj(hidden_TD)
        if not self.own.gated:
            return query, None
        query, gate = query.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        return query.flatten(-2), gate.flatten(-2)

    def _normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None and self.k_norm is not None
        return self.q_norm(query), self.k_norm(key)


class LatentAttention(nn.Module):
    """Multi-head latent attention, the latents expanded: what training needs, for a token is its own query."""

    def __init__(self, config: DecoderConfig, own: LatentAttentionConfig, layer: int) -> None:
        super().__init__()
        hidden, norm = config.hidden_size, own.norm_eps
        self.own, self.layer = own, layer
        self.rotary = Rotary(config, own.rope)
        heads, turned = own.num_attention_heads, own.rope.dims
        queries = heads * (own.nope_dim + turned)
        if own.q_rank is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, own.q_rank, bias=own.bias)
            self.q_a_norm = RMSNorm(own.q_rank, config.norm, eps=norm)
            self.q_b_proj = nn.Linear(own.q_rank, queries, bias=False)
        self.kv_a_proj = nn.Linear(hidden, own.kv_rank + turned, bias=own.bias)
        self.kv_a_norm = RMSNorm(own.kv_rank, config.norm, eps=norm)
        self.shared_key = nn.Identity()  # the place where one key becomes every head's: parallel/tensor.py hooks it
        self.kv_b_proj = nn.Linear(own.kv_rank, heads * (own.nope_dim + own.value_dim), bias=False)
        self.o_proj = nn.Linear(heads * own.value_dim, hidden, bias=own.bias)

    def forward(self, hidden_TD: Tensor, tables: RopeTables, layout: DocumentLayout) -> Tensor:
        """[T, D] -> [T, D]."""
        own = self.own
        query = self._query(hidden_TD).unflatten(-1, (-1, own.nope_dim + own.rope.dims))
        plain, turning = query.split([own.nope_dim, own.rope.dims], dim=-1)
        query = torch.cat((plain, self.rotary(turning, tables)), dim=-1)
        latent, shared = self.kv_a_proj(hidden_TD).split([own.kv_rank, own.rope.dims], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_norm(latent)).unflatten(-1, (-1, own.nope_dim + own.value_dim))
        plain, value = expanded.split([own.nope_dim, own.value_dim], dim=-1)
        shared = self.rotary(self.shared_key(shared)[:, None], tables).expand(-1, plain.shape[1], -1)
        key = torch.cat((plain, shared), dim=-1)
        return self.o_proj(attend(self, query, key, value, layout, None).flatten(-2))

    def _query(self, hidden_TD: Tensor) -> Tensor:
        if self.own.q_rank is None:
            return self.q_proj(hidden_TD)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(hidden_TD)))


@torch.compiler.disable
def attend(
    module: Attention | LatentAttention,
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKV: Tensor,
    layout: DocumentLayout,
    sinks_N: Tensor | None,
) -> Tensor:
    """[T, N, V]: within the packed documents, or over what the layout's cache keeps of them as well.

    Outside what ``train.compile`` compiles: documents differ from row to row, and a layer's number from layer to layer,
    which is why it is read here.
    """
    own, layer = module.own, module.layer
    softcap = own.softcap if isinstance(own, AttentionConfig) else None
    options: dict[str, Any] = {"scale": own.scale, "window": own.window, "softcap": softcap, "sinks_N": sinks_N}
    if layout.cache is not None:
        layout.cache.append(layer, key_TKH, value_TKV, layout)
        return layout.cache.attend(layer, query_TNH, layout, **options)
    return packed_attention(query_TNH, key_TKH, value_TKV, layout, layout.max_seqlen, **options)
