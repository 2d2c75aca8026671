"""GLM-4-0414 (``model_type: glm4``): norms before and after, half of each head turned, neighbours as pairs, gate and
up in one stored tensor."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.phi3 import GATE_UP
from posttrain_lib.models.families.shared import ATTENTION, ATTENTION_BIAS, EMBEDDING_AND_HEAD, in_layer, read_sizes
from posttrain_lib.models.spec import ALL_NORMS, DecoderConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Glm4Config."""
    sizes = read_sizes(fields, positions=131072, head_dim=128, key_value_heads=2, eps=1.5625e-07)
    rope = fields.rope(sizes.head_dim, sizes.positions, partial=0.5, interleaved=True)
    layer = LayerConfig(
        sizes.attention(rope=rope, qkv_bias=fields.boolean("attention_bias", True)),
        MLPConfig(sizes.intermediate, fields.activation("hidden_act")),
        ALL_NORMS,
    )
    return sizes.decoder([layer] * sizes.layers)


_NORMS = (
    in_layer("pre_attention_norm.weight", "input_layernorm.weight"),
    in_layer("post_attention_norm.weight", "post_self_attn_layernorm.weight"),
    in_layer("pre_mlp_norm.weight", "post_attention_layernorm.weight"),
    in_layer("post_mlp_norm.weight", "post_mlp_layernorm.weight"),
)
FAMILY = Family(
    "glm4",
    "Glm4ForCausalLM",
    read_config,
    (*EMBEDDING_AND_HEAD, *_NORMS, *ATTENTION, *ATTENTION_BIAS, *GATE_UP),
)
