"""Qwen2 and Qwen2.5 (``model_type: qwen2``): biases on q, k and v; optional sliding window in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.dense import QKV_BIAS, WEIGHTS, dense_config, sharding_plan
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.spec import DecoderConfig


def read_config(content: Mapping[str, Any]) -> DecoderConfig:
    """config.json -> DecoderConfig; defaults are those of transformers' Qwen2Config."""
    return dense_config(
        ConfigReader(content),
        default_positions=32768,
        default_head_dim=None,
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        slides=True,
    )


_WEIGHT_MAP = WEIGHTS + QKV_BIAS
FAMILY = Family("qwen2", "Qwen2ForCausalLM", read_config, _WEIGHT_MAP, sharding_plan(_WEIGHT_MAP))
