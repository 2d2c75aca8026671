"""Llama (``model_type: llama``): no biases by default, optional llama3 rope scaling, optional ``head_dim``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.dense import MLP_BIAS, O_BIAS, QKV_BIAS, WEIGHTS, dense_config, sharding_plan
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.spec import DecoderConfig


def read_config(content: Mapping[str, Any]) -> DecoderConfig:
    """config.json -> DecoderConfig; defaults are those of transformers' LlamaConfig."""
    fields = ConfigReader(content)
    bias = fields.boolean("attention_bias", False)
    return dense_config(
        fields,
        default_positions=2048,
        default_head_dim=None,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        qk_norm=False,
        slides=False,
    )


_WEIGHT_MAP = WEIGHTS + QKV_BIAS + O_BIAS + MLP_BIAS
FAMILY = Family("llama", "LlamaForCausalLM", read_config, _WEIGHT_MAP, sharding_plan(_WEIGHT_MAP))
