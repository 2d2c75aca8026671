"""gpt-oss (``model_type: gpt_oss``): attention sinks, every second layer slides, experts with biases and a clamped
activation, stored [in, out] with gate and up taking turns."""

from __future__ import annotations

from posttrain_lib.models.families import Family
from posttrain_lib.models.families.fields import ConfigReader
from posttrain_lib.models.families.shared import (
    ATTENTION,
    ATTENTION_BIAS,
    EMBEDDING_AND_HEAD,
    PRE_NORM,
    in_layer,
    read_sizes,
)
from posttrain_lib.models.spec import DecoderConfig, ExpertsConfig, LayerConfig, NormConfig
from posttrain_lib.models.weights import Rule

#: what a file without ``rope_parameters`` means
_YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def read_config(fields: ConfigReader) -> DecoderConfig:
    """Defaults are those of transformers' GptOssConfig."""
    sizes = read_sizes(fields, positions=131072, head_dim=64, key_value_heads=8, eps=1e-5)
    bias, window = fields.boolean("attention_bias", True), fields.window(default=128)
    rope = fields.rope(sizes.head_dim, sizes.positions, theta=150_000.0, usual=_YARN)
    kinds = fields.layer_types(
        sizes.layers,
        ("full_attention", "sliding_attention"),
        lambda layer: "full_attention" if layer % 2 else "sliding_attention",
    )
    fields.skip("initial_context_length", "experts_per_token")  # the maker's own names for other fields
    fields.one_of("swiglu_limit", (7, 7.0), 7.0)
    fields.activation("hidden_act")  # stated as silu, and not what is computed
    experts = ExpertsConfig(
        fields.same_integer(("num_local_experts", "num_experts"), 128),
        fields.integer("num_experts_per_tok", 4),
        sizes.intermediate,
        "clamped_swiglu",
        router="softmax_of_top",
        bias=True,
    )
    return sizes.decoder(
        (
            LayerConfig(sizes.attention(rope=rope, window=window, sinks=True, qkv_bias=bias, o_bias=bias), experts)
            for window in fields.windows(kinds, window)
        ),
        NormConfig(sizes.eps, late_cast=True),
    )


def _alternating(ours: tuple[str, str], theirs: str) -> Rule:
    names = tuple(f"layers.{{n}}.mlp.experts.{name}" for name in ours)
    return Rule(names, f"model.layers.{{n}}.mlp.experts.{theirs}", "alternating")


FAMILY = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    read_config,
    (
        *EMBEDDING_AND_HEAD,
        *PRE_NORM,
        *ATTENTION,
        *ATTENTION_BIAS,
        in_layer("attention.sinks", "self_attn.sinks"),
        in_layer("mlp.router.weight", "mlp.router.weight"),
        in_layer("mlp.router.bias", "mlp.router.bias"),
        _alternating(("gate_proj", "up_proj"), "gate_up_proj"),
        _alternating(("gate_bias", "up_bias"), "gate_up_proj_bias"),
        Rule(("layers.{n}.mlp.experts.down_proj",), "model.layers.{n}.mlp.experts.down_proj", "transposed"),
        in_layer("mlp.experts.down_bias", "mlp.experts.down_proj_bias"),
    ),
)
