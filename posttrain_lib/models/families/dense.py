"""The weight names and the sharding that the dense families share: they differ in which of these exist."""

from __future__ import annotations

from posttrain_lib.models.spec import Sharding

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
