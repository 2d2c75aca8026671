"""Qwen2 and Qwen2.5 (``model_type: qwen2``): biases on q, k and v; optional sliding window in the upper layers."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    MLP,
    PRE_NORM,
    read_sizes,
)
from posttrain_lib.models.spec import DecoderConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Qwen2Config."""
    sizes = read_sizes(fields, positions=32768, key_value_heads=32)
    rope = fields.rope(sizes.head_dim, sizes.positions)
    mlp = MLPConfig(sizes.intermediate, fields.activation("hidden_act"))
    windows = fields.qwen_windows(sizes.layers, default_window=4096, default_first=28)
    return sizes.decoder(
        LayerConfig(sizes.attention(rope=rope, window=window, qkv_bias=True), mlp) for window in windows
    )


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    read_config,
    (*EMBEDDING_AND_HEAD, *PRE_NORM, *ATTENTION, *ATTENTION_BIAS, *MLP),
)
