"""Llama (``model_type: llama``): no biases by default, optional llama3 rope scaling, optional ``head_dim``."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    MLP,
    MLP_BIAS,
    PRE_NORM,
    read_sizes,
)
from posttrain_lib.models.spec import DecoderConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' LlamaConfig."""
    sizes, bias = read_sizes(fields, positions=2048), fields.boolean("attention_bias", False)
    layer = LayerConfig(
        sizes.attention(rope=fields.rope(sizes.head_dim, sizes.positions), qkv_bias=bias, o_bias=bias),
        MLPConfig(sizes.intermediate, fields.activation("hidden_act"), fields.boolean("mlp_bias", False)),
    )
    return sizes.decoder([layer] * sizes.layers)


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    read_config,
    (*EMBEDDING_AND_HEAD, *PRE_NORM, *ATTENTION, *ATTENTION_BIAS, *MLP, *MLP_BIAS),
)
