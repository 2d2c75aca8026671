"""The decoder's building blocks. Module names are the same for every family; shapes come from DecoderConfig.

T packed tokens, D hidden, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posttrain_lib.models.spec import DecoderConfig
from posttrain_lib.ops.attention import DocumentLayout, packed_attention
from posttrain_lib.ops.norm import rms_norm
from posttrain_lib.ops.rope import apply_rope
from posttrain_lib.ops.swiglu import swiglu


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape and, without autocast, same dtype as ``hidden``."""
        return rms_norm(hidden, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query causal attention within documents."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.scale = config.attention_scale
        self.window = config.windows[layer]
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, hidden, bias=config.o_bias)
        # Identity would put a module into the tree that no checkpoint names; None does not.
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, hidden_TD: Tensor, cosine: Tensor, sine: Tensor, layout: DocumentLayout) -> Tensor:
        """[T, D] -> [T, D]."""
        # -1 heads: under tensor parallelism a rank holds a share of them.
        query = self.q_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rope(query, cosine, sine), apply_rope(key, cosine, sine)
        mixed = packed_attention(query, key, value, layout, layout.max_seqlen, scale=self.scale, window=self.window)
        return self.o_proj(mixed.flatten(-2))


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, forward = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, forward, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, forward, bias=config.mlp_bias)
        self.down_proj = nn.Linear(forward, hidden, bias=config.mlp_bias)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.down_proj(swiglu(self.gate_proj(hidden_TD), self.up_proj(hidden_TD)))


class DecoderBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream. The unit of sharding and recomputation."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_TD: Tensor, cosine: Tensor, sine: Tensor, layout: DocumentLayout) -> Tensor:
        """[T, D] -> [T, D]."""
        hidden_TD = hidden_TD + self.attention(self.input_norm(hidden_TD), cosine, sine, layout)
        return hidden_TD + self.mlp(self.post_attention_norm(hidden_TD))
