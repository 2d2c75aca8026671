"""Qwen3-MoE (``model_type: qwen3_moe``): Qwen3's attention, a mixture of experts in place of the feed-forward."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.qwen3 import FAMILY as QWEN3
from posttrain_lib.models.families.shared import EXPERTS, Sizes, read_sizes
from posttrain_lib.models.spec import DecoderConfig, ExpertsConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Qwen3MoeConfig."""
    sizes = read_sizes(fields, positions=32768, key_value_heads=4)
    bias = fields.boolean("attention_bias", False)
    window = fields.window(default=4096) if fields.boolean("use_sliding_window", False) else None
    fields.skip("sliding_window", "max_window_layers")  # transformers slides in all layers or none
    rope = fields.rope(sizes.head_dim, sizes.positions)
    attention = sizes.attention(rope=rope, window=window, qkv_bias=bias, o_bias=bias, qk_norm="head")
    return sizes.decoder(LayerConfig(attention, mlp) for mlp in read_experts(fields, sizes))


def read_experts(
    fields: ConfigReader, sizes: Sizes, *, renormalise: bool = False, **shared: MLPConfig | bool | None
) -> list[MLPConfig | ExpertsConfig]:
    """The feed-forward of each layer: every ``decoder_sparse_step``-th is a mixture, those of ``mlp_only_layers`` are
    not. ``shared``: ExpertsConfig's fields of the expert that all tokens share."""
    activation = fields.activation("hidden_act")
    mixture = ExpertsConfig(
        fields.same_integer(("num_experts", "num_local_experts")),
        fields.integer("num_experts_per_tok"),
        fields.integer("moe_intermediate_size"),
        activation,
        renormalise=fields.boolean("norm_topk_prob", renormalise),
        **shared,  # type: ignore[arg-type]
    )
    every, dense = fields.integer("decoder_sparse_step", 1), set(fields.integers("mlp_only_layers") or ())
    return [
        MLPConfig(sizes.intermediate, activation) if layer in dense or (layer + 1) % every else mixture
        for layer in range(sizes.layers)
    ]


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_config, (*QWEN3.rules, *EXPERTS))
