"""What the families share: sizes out of config.json, rules for weights, the sharding plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from posttrain_lib.models.families.fields import REQUIRED, ConfigReader, check_heads
from posttrain_lib.models.spec import AttentionConfig, DecoderConfig, LayerConfig, NormConfig, Sharding
from posttrain_lib.models.weights import Rule, same


@dataclass(frozen=True)
class Sizes:
    """The fields that every config.json has."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    positions: int
    eps: float
    tied: bool

    def attention(self, **options: Any) -> AttentionConfig:
        """Attention of these heads; ``scale`` is 1 / sqrt(head_dim) unless given."""
        options.setdefault("scale", float(self.head_dim) ** -0.5)
        return AttentionConfig(self.heads, self.key_value_heads, self.head_dim, **options)

    def decoder(self, layers: Iterable[LayerConfig], norm: NormConfig | None = None, **options: Any) -> DecoderConfig:
        """A decoder of these sizes; the norm is the plain one unless given."""
        return DecoderConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            layers=tuple(layers),
            norm=norm or NormConfig(self.eps),
            max_position_embeddings=self.positions,
            tie_word_embeddings=self.tied,
            **options,
        )


def read_sizes(
    fields: ConfigReader,
    *,
    positions: int,
    head_dim: int | None = None,
    key_value_heads: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
) -> Sizes:
    """The sizes of a config.json.

    Args:
        positions, head_dim, key_value_heads, eps, tied: transformers' defaults of the family, for a field that is
            missing; head_dim None or null in the file = hidden size / heads, key_value_heads so = as many as heads.
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    given = fields.optional_integer("num_key_value_heads", key_value_heads) or heads
    size = fields.optional_integer("head_dim", head_dim) or hidden // heads
    check_heads(heads, given, size)
    return Sizes(
        vocab=fields.integer("vocab_size"),
        hidden=hidden,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        key_value_heads=given,
        head_dim=size,
        intermediate=fields.integer("intermediate_size", REQUIRED),
        positions=fields.integer("max_position_embeddings", positions),
        eps=fields.number("rms_norm_eps", eps),
        tied=fields.boolean("tie_word_embeddings", tied),
    )


def in_layer(ours: str, theirs: str) -> Rule:
    """A parameter of every layer, one to one."""
    return same(f"layers.{{n}}.{ours}", f"model.layers.{{n}}.{theirs}")


def linears(ours: str, theirs: str, *names: str, bias: bool = False) -> tuple[Rule, ...]:
    """Projections of one name on both sides."""
    kind = "bias" if bias else "weight"
    return tuple(in_layer(f"{ours}.{name}.{kind}", f"{theirs}.{name}.{kind}") for name in names)


def rows(theirs: str, *ours: str) -> Rule:
    """A stored tensor that holds parameters one below the other."""
    return Rule(tuple(f"layers.{{n}}.{name}" for name in ours), f"model.layers.{{n}}.{theirs}", "rows")


def per_expert(ours: str, theirs: str) -> Rule:
    """A parameter that has one stored tensor per expert, ``{e}``."""
    return Rule((f"layers.{{n}}.mlp.experts.{ours}",), f"model.layers.{{n}}.{theirs}", "experts")


# A rule says nothing where the configuration has no such parameter: a family takes all that its files may hold.
EMBEDDING_AND_HEAD = (
    same("embed_tokens.weight", "model.embed_tokens.weight"),
    same("norm.weight", "model.norm.weight"),
    same("lm_head.weight", "lm_head.weight"),
)
PRE_NORM = (
    in_layer("pre_attention_norm.weight", "input_layernorm.weight"),
    in_layer("pre_mlp_norm.weight", "post_attention_layernorm.weight"),
)
ATTENTION = linears("attention", "self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION_BIAS = linears("attention", "self_attn", "q_proj", "k_proj", "v_proj", "o_proj", bias=True)
QK_NORM = linears("attention", "self_attn", "q_norm", "k_norm")
MLP = linears("mlp", "mlp", "gate_proj", "up_proj", "down_proj")
MLP_BIAS = linears("mlp", "mlp", "gate_proj", "up_proj", "down_proj", bias=True)
EXPERTS = (
    in_layer("mlp.router.weight", "mlp.gate.weight"),
    *(per_expert(name, f"mlp.experts.{{e}}.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")),
)

# Column: the output features are cut; row: the input features are, and outputs are summed over the ranks; expert: the
# first dimension is the expert.
_PLAN: dict[str, Sharding] = {
    "embed_tokens.weight": "vocabulary",
    "lm_head.weight": "vocabulary",
    "attention.q_proj.weight": "column",
    "attention.k_proj.weight": "column",
    "attention.v_proj.weight": "column",
    "attention.q_proj.bias": "column",
    "attention.k_proj.bias": "column",
    "attention.v_proj.bias": "column",
    "attention.q_b_proj.weight": "column",
    "attention.kv_b_proj.weight": "column",
    "attention.o_proj.weight": "row",
    "attention.sinks": "column",
    "mlp.gate_proj.weight": "column",
    "mlp.up_proj.weight": "column",
    "mlp.gate_proj.bias": "column",
    "mlp.up_proj.bias": "column",
    "mlp.down_proj.weight": "row",
    "mlp.shared.gate_proj.weight": "column",
    "mlp.shared.up_proj.weight": "column",
    "mlp.shared.down_proj.weight": "row",
    **{
        f"mlp.experts.{name}": "expert"
        for name in ("gate_proj", "up_proj", "down_proj", "gate_bias", "up_bias", "down_bias")
    },
}


def sharding_plan(rules: Iterable[Rule]) -> dict[str, Sharding]:
    """The plan of a family: attention by heads, feed-forward by features, experts by expert, vocabulary cut, the rest
    (norms, routers, latents, linear attention, biases behind a sum over ranks) whole."""
    names = (name for rule in rules for name in rule.ours)
    return {name: _PLAN.get(name.removeprefix("layers.{n}."), "replicate") for name in names}
