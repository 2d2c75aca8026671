"""Mistral (``model_type: mistral``): Llama's block with one sliding window for all layers, or none."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import ATTENTION, EMBEDDING_AND_HEAD, MLP, PRE_NORM, read_sizes
from posttrain_lib.models.spec import DecoderConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' MistralConfig."""
    sizes = read_sizes(fields, positions=131072, key_value_heads=8)
    layer = LayerConfig(
        sizes.attention(rope=fields.rope(sizes.head_dim, sizes.positions), window=fields.window(default=4096)),
        MLPConfig(sizes.intermediate, fields.activation("hidden_act")),
    )
    return sizes.decoder([layer] * sizes.layers)


FAMILY = Family("mistral", "MistralForCausalLM", read_config, (*EMBEDDING_AND_HEAD, *PRE_NORM, *ATTENTION, *MLP))
