"""Granite (``model_type: granite``): Llama's block with multipliers on embedding, scores, residuals and logits."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.llama import FAMILY as LLAMA
from posttrain_lib.models.families.shared import read_sizes
from posttrain_lib.models.spec import PRE_NORMS, DecoderConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' GraniteConfig."""
    sizes, bias = read_sizes(fields, positions=2048), fields.boolean("attention_bias", False)
    layer = LayerConfig(
        sizes.attention(
            rope=fields.rope(sizes.head_dim, sizes.positions),
            scale=fields.number("attention_multiplier", 1.0),
            qkv_bias=bias,
            o_bias=bias,
        ),
        MLPConfig(sizes.intermediate, fields.activation("hidden_act"), fields.boolean("mlp_bias", False)),
        PRE_NORMS,
        fields.number("residual_multiplier", 1.0),
    )
    return sizes.decoder(
        [layer] * sizes.layers,
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0),
    )


FAMILY = Family("granite", "GraniteForCausalLM", read_config, LLAMA.rules)
