"""Gemma-3's text models (``model_type: gemma3_text``): Gemma-2's block with norms on each query and key head, five
sliding layers to a full one, and a rotary embedding for each of the two kinds."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.gemma2 import SANDWICH, sandwich_decoder
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    MLP,
    QK_NORM,
    read_sizes,
)
from posttrain_lib.models.spec import DecoderConfig

_THETAS = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Gemma3TextConfig."""
    sizes = read_sizes(fields, positions=131072, head_dim=256, key_value_heads=4, tied=True)
    ropes = fields.ropes_by_kind(sizes.head_dim, sizes.positions, _THETAS)
    fields.skip("_sliding_window_pattern")  # transformers writes what it made layer_types of
    every = fields.integer("sliding_window_pattern", 6)
    kinds = fields.layer_types(
        sizes.layers, tuple(_THETAS), lambda layer: "sliding_attention" if (layer + 1) % every else "full_attention"
    )
    fields.one_of("attn_logit_softcapping", (None,), None)  # its modelling code has no place for one
    return sandwich_decoder(fields, sizes, kinds, ropes, qk_norm="head")


FAMILY = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    read_config,
    (*EMBEDDING_AND_HEAD, *SANDWICH, *ATTENTION, *ATTENTION_BIAS, *QK_NORM, *MLP),
)
