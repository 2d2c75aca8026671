"""Qwen2 and Qwen2.5 (``model_type: qwen2``): biases on q, k and v; optional sliding window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.dense import QKV_BIAS, WEIGHTS, sharding_plan
from posttrain_lib.models.families.fields import ConfigReader, check_heads
from posttrain_lib.models.spec import DecoderConfig


def read_config(content: Mapping[str, Any]) -> DecoderConfig:
    """config.json -> DecoderConfig; defaults are those of transformers' Qwen2Config."""
    fields = ConfigReader(content)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    key_value_heads = fields.integer("num_key_value_heads", heads)
    head_dim = fields.optional("head_dim") or hidden // heads
    check_heads(hidden, heads, key_value_heads, head_dim)
    fields.one_of("hidden_act", ("silu",), "silu")
    positions = fields.integer("max_position_embeddings", 32768)
    config = DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=positions,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        rope=fields.rope(positions),
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=fields.windows(layers, default_window=4096, default_first=28),
    )
    fields.finish()
    return config


_WEIGHT_MAP = WEIGHTS + QKV_BIAS
FAMILY = Family("qwen2", "Qwen2ForCausalLM", read_config, _WEIGHT_MAP, sharding_plan(_WEIGHT_MAP))
