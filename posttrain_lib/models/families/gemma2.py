"""Gemma-2 (``model_type: gemma2``): norms before and after, soft caps on scores and logits, every second layer slides,
scaled embeddings, a scale of its own on the scores."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    MLP,
    in_layer,
    read_sizes,
)
from posttrain_lib.models.spec import ALL_NORMS, DecoderConfig, LayerConfig, MLPConfig, NormConfig

#: norms before and after attention and feed-forward, as Gemma's files name them
SANDWICH = (
    in_layer("pre_attention_norm.weight", "input_layernorm.weight"),
    in_layer("post_attention_norm.weight", "post_attention_layernorm.weight"),
    in_layer("pre_mlp_norm.weight", "pre_feedforward_layernorm.weight"),
    in_layer("post_mlp_norm.weight", "post_feedforward_layernorm.weight"),
)


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Gemma2Config."""
    sizes = read_sizes(fields, positions=8192, head_dim=256, key_value_heads=4, tied=True)
    bias, window = fields.boolean("attention_bias", False), fields.window(default=4096)
    rope = fields.rope(sizes.head_dim, sizes.positions)
    scale, softcap = (
        fields.number("query_pre_attn_scalar", 256) ** -0.5,
        fields.optional_number("attn_logit_softcapping", 50.0),
    )
    fields.one_of("use_bidirectional_attention", (None, False), None)
    mlp = MLPConfig(sizes.intermediate, fields.activation("hidden_activation", "hidden_act"))
    kinds = fields.layer_types(
        sizes.layers,
        ("full_attention", "sliding_attention"),
        lambda layer: "full_attention" if layer % 2 else "sliding_attention",
    )
    attention = {
        kind: sizes.attention(
            rope=rope,
            scale=scale,
            softcap=softcap,
            qkv_bias=bias,
            o_bias=bias,
            window=window if kind == "sliding_attention" else None,
        )
        for kind in set(kinds)
    }
    return sizes.decoder(
        (LayerConfig(attention[kind], mlp, ALL_NORMS) for kind in kinds),
        NormConfig(sizes.eps, plus_one=True, late_cast=True),
        embedding_scale=sizes.hidden**0.5,
        logit_softcap=fields.optional_number("final_logit_softcapping", 30.0),
    )


FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    read_config,
    (*EMBEDDING_AND_HEAD, *SANDWICH, *ATTENTION, *ATTENTION_BIAS, *MLP),
)
