"""DeepSeek-V3 and R1 (``model_type: deepseek_v3``): latent attention, sigmoid router with groups and a correction,
shared experts, the first layers dense. Its multi-token prediction layer is not trained."""

from __future__ import annotations

from dataclasses import replace

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader, yarn_stretch
from posttrain_lib.models.families.shared import (
    EMBEDDING_AND_HEAD,
    EXPERTS,
    MLP,
    PRE_NORM,
    in_layer,
    linears,
    read_sizes,
)
from posttrain_lib.models.spec import DecoderConfig, ExpertsConfig, LatentAttentionConfig, LayerConfig, MLPConfig


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' DeepseekV3Config."""
    turned, plain = fields.integer("qk_rope_head_dim", 64), fields.integer("qk_nope_head_dim", 128)
    sizes = read_sizes(fields, positions=4096, head_dim=turned)
    interleaved = fields.boolean("rope_interleave", True)
    scale = float(turned + plain) ** -0.5 * _stretch(fields) ** 2
    attention = LatentAttentionConfig(
        num_attention_heads=sizes.heads,
        q_rank=fields.optional_integer("q_lora_rank", 1536),
        kv_rank=fields.integer("kv_lora_rank", 512),
        nope_dim=plain,
        value_dim=fields.integer("v_head_dim", 128),
        scale=scale,
        rope=fields.rope(turned, sizes.positions, interleaved=interleaved),
        norm_eps=1e-6,  # the modelling code leaves the norms of the latents at their default
        bias=fields.boolean("attention_bias", False),
    )
    activation, forward = fields.activation("hidden_act"), fields.integer("moe_intermediate_size", 2048)
    experts = ExpertsConfig(
        fields.same_integer(("n_routed_experts", "num_local_experts"), 256),
        fields.integer("num_experts_per_tok", 8),
        forward,
        activation,
        router="sigmoid",
        renormalise=fields.boolean("norm_topk_prob", True),
        float_weights=True,
        routed_scale=fields.number("routed_scaling_factor", 2.5),
        n_group=fields.integer("n_group", 8),
        topk_group=fields.integer("topk_group", 4),
        shared=MLPConfig(forward * fields.integer("n_shared_experts", 1), activation),
    )
    fields.one_of("qk_head_dim", (turned + plain,), turned + plain)
    fields.one_of("scoring_func", ("sigmoid",), "sigmoid")
    fields.one_of("topk_method", ("noaux_tc",), "noaux_tc")
    fields.one_of("moe_layer_freq", (1,), 1)
    fields.skip("ep_size", "num_nextn_predict_layers")
    dense = fields.integer("first_k_dense_replace", 3, minimum=0)
    return sizes.decoder(
        LayerConfig(attention, MLPConfig(sizes.intermediate, activation) if layer < dense else experts)
        for layer in range(sizes.layers)
    )


def _stretch(fields: ConfigReader) -> float:
    """What yarn's ``mscale_all_dim`` multiplies queries and keys by, each."""
    given = fields.peek("rope_parameters") or fields.peek("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    all_dim = given.get("mscale_all_dim", 0)
    return yarn_stretch(given["factor"], all_dim) if kind != "default" and all_dim and "factor" in given else 1.0


_NAMES = (
    ("q_a_proj.weight", "q_a_proj.weight"),
    ("q_a_proj.bias", "q_a_proj.bias"),
    ("q_a_norm.weight", "q_a_layernorm.weight"),
    ("q_b_proj.weight", "q_b_proj.weight"),
    ("q_proj.weight", "q_proj.weight"),
    ("kv_a_proj.weight", "kv_a_proj_with_mqa.weight"),
    ("kv_a_proj.bias", "kv_a_proj_with_mqa.bias"),
    ("kv_a_norm.weight", "kv_a_layernorm.weight"),
    ("kv_b_proj.weight", "kv_b_proj.weight"),
    ("o_proj.weight", "o_proj.weight"),
    ("o_proj.bias", "o_proj.bias"),
)
FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    read_config,
    (
        *EMBEDDING_AND_HEAD,
        *PRE_NORM,
        *(in_layer(f"attention.{ours}", f"self_attn.{theirs}") for ours, theirs in _NAMES),
        *MLP,
        *EXPERTS,
        replace(in_layer("mlp.router.correction_bias", "mlp.gate.e_score_correction_bias"), float32=True),
        *linears("mlp.shared", "mlp.shared_experts", "gate_proj", "up_proj", "down_proj"),
    ),
    left_alone=r"model\.layers\.{layers}\.",
)
