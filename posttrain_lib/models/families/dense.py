"""What the dense families share: the fields of config.json, weight names, sharding. They differ in which exist."""

from __future__ import annotations

from posttrain_lib.models.families.fields import ConfigReader, check_heads
from posttrain_lib.models.spec import DecoderConfig, Sharding


def dense_config(
    fields: ConfigReader,
    *,
    default_positions: int,
    default_head_dim: int | None,
    qkv_bias: bool,
    o_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
    slides: bool,
) -> DecoderConfig:
    """The DecoderConfig of a family's config.json; refuses what is left in ``fields`` unread.

    Args:
        default_positions, default_head_dim: transformers' defaults of the family; None = hidden size / heads.
        slides: the family knows sliding windows (with Qwen's fields and defaults).
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    key_value_heads = fields.optional_integer("num_key_value_heads") or heads
    head_dim = fields.optional_integer("head_dim") or default_head_dim or hidden // heads
    check_heads(hidden, heads, key_value_heads, head_dim)
    fields.one_of("hidden_act", ("silu",), "silu")
    positions = fields.integer("max_position_embeddings", default_positions)
    config = DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=positions,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        rope=fields.rope(positions),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=fields.windows(layers, default_window=4096, default_first=28) if slides else (None,) * layers,
    )
    fields.finish()
    return config


# Ours -> Hugging Face. A family takes the rows that its configuration can have.
EMBEDDING_AND_HEAD = (
    ("embed_tokens.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
)
NORMS = (
    ("layers.{n}.input_norm.weight", "model.layers.{n}.input_layernorm.weight"),
    ("layers.{n}.post_attention_norm.weight", "model.layers.{n}.post_attention_layernorm.weight"),
)
ATTENTION = tuple(
    (f"layers.{{n}}.attention.{name}.weight", f"model.layers.{{n}}.self_attn.{name}.weight")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj")
)
QKV_BIAS = tuple(
    (f"layers.{{n}}.attention.{name}.bias", f"model.layers.{{n}}.self_attn.{name}.bias")
    for name in ("q_proj", "k_proj", "v_proj")
)
O_BIAS = (("layers.{n}.attention.o_proj.bias", "model.layers.{n}.self_attn.o_proj.bias"),)
QK_NORM = tuple(
    (f"layers.{{n}}.attention.{name}.weight", f"model.layers.{{n}}.self_attn.{name}.weight")
    for name in ("q_norm", "k_norm")
)
MLP = tuple(
    (f"layers.{{n}}.mlp.{name}.weight", f"model.layers.{{n}}.mlp.{name}.weight")
    for name in ("gate_proj", "up_proj", "down_proj")
)
MLP_BIAS = tuple(
    (f"layers.{{n}}.mlp.{name}.bias", f"model.layers.{{n}}.mlp.{name}.bias")
    for name in ("gate_proj", "up_proj", "down_proj")
)
WEIGHTS = EMBEDDING_AND_HEAD + NORMS + ATTENTION + MLP

# Column: the output features are cut; row: the input features are, and outputs are summed over the ranks.
_PLAN: dict[str, Sharding] = {
    "embed_tokens": "vocabulary",
    "lm_head": "vocabulary",
    "q_proj": "column",
    "k_proj": "column",
    "v_proj": "column",
    "o_proj": "row",
    "gate_proj": "column",
    "up_proj": "column",
    "down_proj": "row",
}


def sharding_plan(weight_map: tuple[tuple[str, str], ...]) -> dict[str, Sharding]:
    """The usual plan: attention by heads, MLP by features, vocabulary cut, norms and row biases whole."""
    plan: dict[str, Sharding] = {}
    for name, _ in weight_map:
        module, kind = name.split(".")[-2:]
        cut: Sharding = _PLAN.get(module, "replicate")
        plan[name] = "replicate" if cut == "row" and kind == "bias" else cut
    return plan
