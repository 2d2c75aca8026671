"""OLMoE (``model_type: olmoe``): norms over whole query and key, optional clipping, a mixture of experts."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    EXPERTS,
    PRE_NORM,
    QK_NORM,
    read_sizes,
)
from posttrain_lib.models.spec import DecoderConfig, ExpertsConfig, LayerConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' OlmoeConfig."""
    sizes, bias = read_sizes(fields, positions=4096, eps=1e-5), fields.boolean("attention_bias", False)
    rope = fields.rope(sizes.head_dim, sizes.positions)
    experts = ExpertsConfig(
        fields.same_integer(("num_experts", "num_local_experts"), 64),
        fields.integer("num_experts_per_tok", 8),
        sizes.intermediate,
        fields.activation("hidden_act"),
        renormalise=fields.boolean("norm_topk_prob", False),
    )
    attention = sizes.attention(
        rope=rope, qkv_bias=bias, o_bias=bias, qk_norm="projection", clip=fields.optional_number("clip_qkv")
    )
    return sizes.decoder([LayerConfig(attention, experts)] * sizes.layers)


FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    read_config,
    (*EMBEDDING_AND_HEAD, *PRE_NORM, *ATTENTION, *ATTENTION_BIAS, *QK_NORM, *EXPERTS),
)
