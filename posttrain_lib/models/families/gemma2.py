"""Gemma-2 (``model_type: gemma2``): norms before and after, soft caps on scores and logits, every second layer slides,
scaled embeddings, a scale of its own on the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    MLP,
    Sizes,
    in_layer,
    read_sizes,
)
from posttrain_lib.models.spec import ALL_NORMS, DecoderConfig, LayerConfig, MLPConfig, NormConfig, RopeConfig

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
    rope = fields.rope(sizes.head_dim, sizes.positions)
    kinds = fields.layer_types(
        sizes.layers,
        ("full_attention", "sliding_attention"),
        lambda layer: "full_attention" if layer % 2 else "sliding_attention",
    )
    softcap = fields.optional_number("attn_logit_softcapping", 50.0)
    return sandwich_decoder(fields, sizes, kinds, dict.fromkeys(kinds, rope), logit_cap=30.0, softcap=softcap)


def sandwich_decoder(
    fields: ConfigReader,
    sizes: Sizes,
    kinds: Sequence[str],
    ropes: Mapping[str, RopeConfig],
    *,
    logit_cap: float | None = None,
    **attention: Any,
) -> DecoderConfig:
    """What Gemma-2 and Gemma-3 have in common: all but the kinds of layers and their rotary embeddings.

    Args:
        kinds: of each layer. ropes: by kind.
        logit_cap: the family's default. attention: what else its attention has.
    """
    bias, window = fields.boolean("attention_bias", False), fields.window(default=4096)
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    fields.one_of("use_bidirectional_attention", (None, False), None)
    mlp = MLPConfig(sizes.intermediate, fields.activation("hidden_activation", default="gelu_pytorch_tanh"))
    fields.skip("hidden_act")  # the modelling code reads the other one
    layers = {
        kind: LayerConfig(
            sizes.attention(
                rope=ropes[kind],
                scale=scale,
                qkv_bias=bias,
                o_bias=bias,
                window=own,
                **attention,
            ),
            mlp,
            ALL_NORMS,
        )
        for kind, own in set(zip(kinds, fields.windows(kinds, window), strict=True))
    }
    return sizes.decoder(
        (layers[kind] for kind in kinds),
        NormConfig(sizes.eps, plus_one=True, late_cast=True),
        embedding_scale=sizes.hidden**0.5,
        logit_softcap=fields.optional_number("final_logit_softcapping", logit_cap),
    )


FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    read_config,
    (*EMBEDDING_AND_HEAD, *SANDWICH, *ATTENTION, *ATTENTION_BIAS, *MLP),
)
