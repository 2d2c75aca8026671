"""Qwen3 (``model_type: qwen3``): an RMS norm on each query and key head, ``head_dim`` apart from hidden/heads."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    MLP,
    PRE_NORM,
    QK_NORM,
    read_sizes,
)
from posttrain_lib.models.spec import DecoderConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Qwen3Config."""
    sizes = read_sizes(fields, positions=32768, head_dim=128, key_value_heads=32)
    bias = fields.boolean("attention_bias", False)
    rope = fields.rope(sizes.head_dim, sizes.positions)
    mlp = MLPConfig(sizes.intermediate, fields.activation("hidden_act"))
    windows = fields.qwen_windows(sizes.layers, default_window=4096, default_first=28)
    return sizes.decoder(
        LayerConfig(sizes.attention(rope=rope, window=window, qkv_bias=bias, o_bias=bias, qk_norm="head"), mlp)
        for window in windows
    )


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    read_config,
    (*EMBEDDING_AND_HEAD, *PRE_NORM, *ATTENTION, *ATTENTION_BIAS, *QK_NORM, *MLP),
)
