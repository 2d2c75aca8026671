"""Qwen3-Next (``model_type: qwen3_next``): three layers of gated delta rule to one of gated attention, experts with a
shared one behind a gate. Its multi-token prediction layers are not trained."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.qwen3_moe import FAMILY as QWEN3_MOE
from posttrain_lib.models.families.qwen3_moe import read_experts
from posttrain_lib.models.families.shared import in_layer, linears, read_sizes
from posttrain_lib.models.spec import DecoderConfig, GatedDeltaConfig, LayerConfig, Mixer, MLPConfig, NormConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' Qwen3NextConfig."""
    sizes = read_sizes(fields, positions=32768, head_dim=256, key_value_heads=2)
    bias = fields.boolean("attention_bias", False)
    rope = fields.rope(sizes.head_dim, sizes.positions, partial=0.25)
    mixers: dict[str, Mixer] = {
        "full_attention": sizes.attention(rope=rope, qkv_bias=bias, o_bias=bias, qk_norm="head", gated=True),
        "linear_attention": GatedDeltaConfig(
            fields.integer("linear_num_key_heads", 16),
            fields.integer("linear_num_value_heads", 32),
            fields.integer("linear_key_head_dim", 128),
            fields.integer("linear_value_head_dim", 128),
            fields.integer("linear_conv_kernel_dim", 4),
            sizes.eps,
        ),
    }
    every = fields.integer("full_attention_interval", 4)
    kinds = fields.layer_types(
        sizes.layers, tuple(mixers), lambda layer: "linear_attention" if (layer + 1) % every else "full_attention"
    )
    shared = MLPConfig(fields.integer("shared_expert_intermediate_size", 512), fields.activation("hidden_act"))
    experts = read_experts(fields, sizes, renormalise=True, shared=shared, shared_gate=True)
    return sizes.decoder(
        (LayerConfig(mixers[kind], mlp) for kind, mlp in zip(kinds, experts, strict=True)),
        NormConfig(sizes.eps, plus_one=True, late_cast=True),
    )


FAMILY = Family(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    read_config,
    (
        *QWEN3_MOE.rules,
        *linears("attention", "linear_attn", "in_proj_qkvz", "in_proj_ba", "norm", "out_proj"),
        in_layer("attention.convolution", "linear_attn.conv1d.weight"),
        in_layer("attention.dt_bias", "linear_attn.dt_bias"),
        in_layer("attention.A_log", "linear_attn.A_log"),
        *linears("mlp.shared", "mlp.shared_expert", "gate_proj", "up_proj", "down_proj"),
        in_layer("mlp.shared_gate.weight", "mlp.shared_expert_gate.weight"),
    ),
    left_alone=r"mtp\.",
)
