"""What a model is, as data: the decoder's configuration, how its weights meet Hugging Face files, how it is sharded.

Nothing here imports torch at the top: a plan, a memory estimate or a conversion reads it without building the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from posttrain_lib.errors import ConfigError

if TYPE_CHECKING:
    from posttrain_lib.models.weights import Piece, Rule

Sharding = Literal["column", "row", "vocabulary", "expert", "replicate"]
Activation = Literal["silu", "gelu_tanh", "gelu", "clamped_swiglu"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. ``kind`` is Hugging Face's ``rope_type``; the other fields belong to some kinds.

    ``dims`` entries of a head are turned, the first ones. ``interleaved``: neighbours form a pair, not halves.
    ``factor`` divides frequencies (linear, llama3, yarn); ``low_freq_factor``, ``high_freq_factor`` and
    ``original_max_position_embeddings`` bound llama3's band of interpolated wavelengths; ``beta_fast``, ``beta_slow``
    and ``truncate`` bound yarn's ramp. ``attention_factor`` multiplies cosine and sine. ``short_factor`` and
    ``long_factor``, one number a pair each, divide longrope's frequencies: the first in documents of up to
    ``original_max_position_embeddings`` tokens, the second in longer ones.
    """

    theta: float
    dims: int
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    interleaved: bool = False
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class NormConfig:
    """RMS norm. ``plus_one``: the factor is 1 + weight (Gemma). ``late_cast``: the weight multiplies before the result
    is rounded to the input's dtype, in place of after it (Gemma, OLMo, gpt-oss)."""

    eps: float
    plus_one: bool = False
    late_cast: bool = False


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    ``scale`` multiplies the query-key products. ``rope`` None: no position at all (NoPE). ``window``: a token sees
    itself and ``window - 1`` tokens before it; None = the whole document before it. ``softcap`` bounds the products.
    ``sinks``: a learned logit per head takes part in the softmax. ``qk_norm``: over each head, or over the whole
    projection; before the rotary embedding unless ``qk_norm_after_rope``. ``clip`` bounds query, key and value before
    that. ``gated``: the query projection gives each head a gate as well, whose sigmoid multiplies its output.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    qk_norm_after_rope: bool = False
    clip: float | None = None
    gated: bool = False


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values come out of a small latent vector.

    ``q_rank`` None: the query has no latent. Each query and key head has ``nope_dim`` entries without position and
    ``rope.dims`` with; those of the key are shared by all heads. ``bias``: of the projections into the latents and of
    the output.
    """

    num_attention_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    value_dim: int
    scale: float
    rope: RopeConfig
    norm_eps: float
    bias: bool = False
    window: None = None


@dataclass(frozen=True)
class GatedDeltaConfig:
    """Linear attention by the gated delta rule (Yang et al. 2024), behind a short causal convolution."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm_eps: float
    rope: None = None
    window: None = None


@dataclass(frozen=True)
class MLPConfig:
    """Gated feed-forward."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts: each token goes through ``top_k`` of ``num_experts`` gated feed-forwards.

    ``router``: "softmax" over all experts, then the highest (Mixtral, Qwen3-MoE); "softmax_of_top": the highest
    logits, then softmax over those (gpt-oss); "sigmoid": scores by sigmoid, chosen with a correction that does not
    enter the weight, within the best ``topk_group`` of ``n_group`` groups (DeepSeek-V3). ``renormalise``: chosen
    weights are divided by their sum. ``float_weights``: the weights stay float32 (Mixtral). ``shared``: an expert for
    every token, behind the sigmoid of a learned gate if ``shared_gate``.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    activation: Activation = "silu"
    router: Literal["softmax", "softmax_of_top", "sigmoid"] = "softmax"
    renormalise: bool = False
    float_weights: bool = False
    routed_scale: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    bias: bool = False
    shared: MLPConfig | None = None
    shared_gate: bool = False


Mixer = AttentionConfig | LatentAttentionConfig | GatedDeltaConfig
NormPlace = Literal["pre_attention", "post_attention", "pre_mlp", "post_mlp"]
PRE_NORMS: tuple[NormPlace, ...] = ("pre_attention", "pre_mlp")
POST_NORMS: tuple[NormPlace, ...] = ("post_attention", "post_mlp")
ALL_NORMS: tuple[NormPlace, ...] = ("pre_attention", "post_attention", "pre_mlp", "post_mlp")


@dataclass(frozen=True)
class LayerConfig:
    """One block: ``residual_scale`` multiplies what attention and feed-forward add to the stream."""

    attention: Mixer
    mlp: MLPConfig | ExpertsConfig
    norms: tuple[NormPlace, ...] = PRE_NORMS
    residual_scale: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the decoder's mathematics. Field names are Hugging Face's where it has one.

    ``embedding_scale`` multiplies the embedding, rounded to its weight's dtype first. ``logit_scale`` multiplies the
    logits, ``logit_softcap`` bounds them after that. ``padded_vocab_size``: rows that embedding and head have in
    memory, None = as many as the vocabulary; those behind it are never stored (see ``models.vocabulary``).
    ``score_head``: in place of a row for every token the head has a single one, whose product is a document's score
    (see ``models.score``); nothing is then tied, scaled or bounded.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm: NormConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    padded_vocab_size: int | None = None
    score_head: bool = False

    @property
    def head_entries(self) -> int:
        """Outputs of the head for one hidden state, padding left out."""
        return 1 if self.score_head else self.vocab_size

    @property
    def vocabulary_rows(self) -> int:
        """Rows of embedding and head in memory, padding included."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return len(self.layers)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer carries a state from token to token."""
        return any(isinstance(layer.attention, GatedDeltaConfig) for layer in self.layers)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings that some layer uses, in order of first use."""
        return tuple(dict.fromkeys(layer.attention.rope for layer in self.layers if layer.attention.rope is not None))

    @property
    def rope_bounds(self) -> tuple[int, ...]:
        """Document lengths beyond which another set of rotary frequencies is in use, for all of its tokens."""
        return tuple(rope.original_max_position_embeddings for rope in self.ropes if rope.kind == "longrope")

    def changes_rope(self, before: int, after: int) -> bool:
        """Whether a document's earlier tokens turn otherwise once it grows from ``before`` tokens to ``after``."""
        return any(0 < before <= bound < after for bound in self.rope_bounds)


def check_prefixes(config: DecoderConfig, share_prefixes: bool, longest: int) -> None:
    """Refuse shared beginnings where a token of them would not be the same in every document.

    A recurrence has one past for each token. With longrope a token turns by the length of its document: one of up to
    ``longest`` tokens may begin like a short one.

    Raises:
        ConfigError: saying which field to set.
    """
    bound = min(config.rope_bounds, default=longest)
    if share_prefixes and longest > bound:
        raise ConfigError(
            "documents cannot share their beginnings where a rotary embedding goes by the document's length",
            where="train.share_prefixes",
            got=f"true, and documents of up to {longest} tokens",
            expected=f"false, or no document above {bound} tokens (longrope's original_max_position_embeddings)",
        )
    if share_prefixes and config.is_recurrent:
        raise ConfigError(
            "documents cannot share their beginnings in a model with linear attention",
            where="train.share_prefixes",
            got=True,
            expected=False,
        )


def can_share_prefixes(config: DecoderConfig | Any, longest: int) -> bool:
    """Whether documents of up to ``longest`` tokens may share their beginnings; see :func:`check_prefixes`."""
    return not (config.is_recurrent or config.changes_rope(1, longest))


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of a family, and how it meets Hugging Face files.

    ``rules`` pair our parameter names with Hugging Face's (see ``models.weights``). ``sharding_plan`` says for our
    weight names (with ``{n}`` for the layer) along which dimension they are cut. ``left_alone`` matches stored tensors
    that are neither trained nor exported (layers for multi-token prediction). ``initialised``: our parameters that the
    folder does not hold and that are made after loading; an export holds them. ``hf_config`` is the folder's
    config.json as it was read; export writes it back.
    """

    family: str
    config: DecoderConfig
    rules: tuple[Rule, ...]
    sharding_plan: Mapping[str, Sharding]
    left_alone: str | None = None
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    initialised: tuple[str, ...] = ()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Our parameter name -> shape, in the decoder's order. A tied head has no entry of its own."""
        return parameter_shapes(self.config)

    def unpadded_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same without the vocabulary's padding: what of each parameter is stored."""
        rows = self.config.vocab_size
        shapes = self.parameter_shapes()
        return {name: (rows, *shape[1:]) if name in VOCABULARY_WEIGHTS else shape for name, shape in shapes.items()}

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Every region of a parameter and the region of a stored tensor that it is."""
        from posttrain_lib.models.weights import pieces_of

        return pieces_of(self.rules, self.unpadded_shapes())

    @cached_property
    def stored(self) -> dict[str, tuple[tuple[int, ...], tuple[Piece, ...]]]:
        """Stored tensor -> its shape and the pieces that it consists of, in order."""
        from posttrain_lib.models.weights import stored_shapes

        parts: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            parts.setdefault(piece.theirs, []).append(piece)
        return {name: (shape, tuple(parts[name])) for name, shape in stored_shapes(self.pieces).items()}

    @property
    def pieces_to_load(self) -> tuple[Piece, ...]:
        """Those that the folder holds."""
        return tuple(piece for piece in self.pieces if piece.ours not in self.initialised)

    def sharding_of(self, name: str) -> Sharding:
        """How the parameter ``name`` is cut over ranks."""
        return self.sharding_plan[layer_pattern(name)]


#: our parameters that have a row for every token
VOCABULARY_WEIGHTS = ("embed_tokens.weight", "lm_head.weight")
_LAYER = re.compile(r"^layers\.(\d+)\.")


def layer_pattern(name: str) -> str:
    """``layers.3.mlp.up_proj.weight`` -> ``layers.{n}.mlp.up_proj.weight``."""
    return _LAYER.sub("layers.{n}.", name)


def layer_number(name: str) -> int | None:
    """The layer of a parameter, None for those outside the layers."""
    found = _LAYER.match(name)
    return int(found.group(1)) if found else None


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter name -> shape for the whole decoder, read off the definition itself (built without memory)."""
    from posttrain_lib.models.decoder import shapes_of

    return dict(shapes_of(config))


def layer_parameter_shapes(config: DecoderConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Parameter name inside one layer -> shape."""
    prefix = f"layers.{layer}."
    shapes = parameter_shapes(config)
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def parameter_count(config: DecoderConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(_numel(shape) for shape in parameter_shapes(config).values())


def matmul_parameters(spec: ModelSpec) -> tuple[int, int]:
    """(body, head): parameters that take part in a matrix product per token.

    The embedding lookup is no product and is not counted; the output head is, tied or not. Norms, biases and the
    short convolution are not products. Of experts, those count that a token goes through. A training step costs 6
    FLOPs per token and body parameter, and 6 per *supervised* token and head parameter (of a score head: per document),
    besides attention.
    """
    config = spec.config
    body = 0
    for name, shape in parameter_shapes(config).items():
        layer = layer_number(name)
        if layer is None:
            continue
        mlp = config.layers[layer].mlp
        if ".experts." in name and isinstance(mlp, ExpertsConfig):
            body += _numel(shape) * mlp.top_k // mlp.num_experts if len(shape) == 3 else 0
        elif len(shape) == 2:
            body += _numel(shape)
    return body, config.head_entries * config.hidden_size


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
