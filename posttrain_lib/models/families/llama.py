"""Llama (``model_type: llama``): no biases by default, optional llama3 rope scaling, optional ``head_dim``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.dense import MLP_BIAS, O_BIAS, QKV_BIAS, WEIGHTS, sharding_plan
from posttrain_lib.models.families.fields import ConfigReader, check_heads
from posttrain_lib.models.spec import DecoderConfig


def read_config(content: Mapping[str, Any]) -> DecoderConfig:
    """config.json -> DecoderConfig; defaults are those of transformers' LlamaConfig."""
    fields = ConfigReader(content)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    key_value_heads = fields.optional("num_key_value_heads") or heads
    head_dim = fields.optional("head_dim") or hidden // heads
    check_heads(hidden, heads, key_value_heads, head_dim)
    fields.one_of("hidden_act", ("silu",), "silu")
    positions = fields.integer("max_position_embeddings", 2048)
    bias = fields.boolean("attention_bias", False)
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
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        qk_norm=False,
        windows=(None,) * layers,
    )
    fields.finish()
    return config


_WEIGHT_MAP = WEIGHTS + QKV_BIAS + O_BIAS + MLP_BIAS
FAMILY = Family("llama", "LlamaForCausalLM", read_config, _WEIGHT_MAP, sharding_plan(_WEIGHT_MAP))
