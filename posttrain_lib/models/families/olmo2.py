"""OLMo-2 (``model_type: olmo2``): norms after attention and feed-forward only, and over whole query and key."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    MLP,
    QK_NORM,
    in_layer,
    read_sizes,
)
from posttrain_lib.models.spec import POST_NORMS, DecoderConfig, LayerConfig, MLPConfig, NormConfig

POST_NORM = (
    in_layer("post_attention_norm.weight", "post_attention_layernorm.weight"),
    in_layer("post_mlp_norm.weight", "post_feedforward_layernorm.weight"),
)
RULES = (*EMBEDDING_AND_HEAD, *POST_NORM, *ATTENTION, *ATTENTION_BIAS, *QK_NORM, *MLP)


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Olmo2Config."""
    sizes = read_sizes(fields, positions=2048, eps=1e-5)
    bias = fields.boolean("attention_bias", False)
    rope = fields.rope(sizes.head_dim, sizes.positions)
    layer = LayerConfig(
        sizes.attention(rope=rope, qkv_bias=bias, o_bias=bias, qk_norm="projection"),
        MLPConfig(sizes.intermediate, fields.activation("hidden_act")),
        POST_NORMS,
    )
    return sizes.decoder([layer] * sizes.layers, NormConfig(sizes.eps, late_cast=True))


FAMILY = Family("olmo2", "Olmo2ForCausalLM", read_config, RULES)
