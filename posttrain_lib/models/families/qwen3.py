"""Qwen3 (``model_type: qwen3``): an RMS norm on each query and key head, ``head_dim`` apart from hidden/heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.dense import O_BIAS, QK_NORM, QKV_BIAS, WEIGHTS, dense_config, sharding_plan
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.spec import DecoderConfig


def read_config(content: Mapping[str, Any]) -> DecoderConfig:
    """config.json -> DecoderConfig; defaults are those of transformers' Qwen3Config."""
    fields = ConfigReader(content)
    bias = fields.boolean("attention_bias", False)
    return dense_config(
        fields,
        default_positions=32768,
        default_head_dim=128,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        qk_norm=True,
        slides=True,
    )


_WEIGHT_MAP = WEIGHTS + QK_NORM + QKV_BIAS + O_BIAS
FAMILY = Family("qwen3", "Qwen3ForCausalLM", read_config, _WEIGHT_MAP, sharding_plan(_WEIGHT_MAP))
