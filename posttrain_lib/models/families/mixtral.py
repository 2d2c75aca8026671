"""Mixtral (``model_type: mixtral``): Mistral's attention, a mixture of experts under names of its own."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    EMBEDDING_AND_HEAD,
    PRE_NORM,
    in_layer,
    per_expert,
    read_sizes,
)
from posttrain_lib.models.spec import DecoderConfig, ExpertsConfig, LayerConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' MixtralConfig."""
    sizes = read_sizes(fields, positions=131072, key_value_heads=8, eps=1e-5)
    fields.one_of("router_jitter_noise", (0, 0.0), 0.0)
    rope = fields.rope(sizes.head_dim, sizes.positions, theta=1e6)
    experts = ExpertsConfig(
        fields.same_integer(("num_local_experts", "num_experts"), 8),
        fields.integer("num_experts_per_tok", 2),
        sizes.intermediate,
        fields.activation("hidden_act"),
        renormalise=True,
        float_weights=True,
    )
    layer = LayerConfig(sizes.attention(rope=rope, window=fields.window()), experts)
    return sizes.decoder([layer] * sizes.layers)


_EXPERTS = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    read_config,
    (
        *EMBEDDING_AND_HEAD,
        *PRE_NORM,
        *ATTENTION,
        in_layer("mlp.router.weight", "block_sparse_moe.gate.weight"),
        *(per_expert(ours, f"block_sparse_moe.experts.{{e}}.{theirs}.weight") for ours, theirs in _EXPERTS),
    ),
)
