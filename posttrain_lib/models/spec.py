"""What a model is, as data: the decoder's configuration, its weight names and how it is sharded.

Nothing here imports torch: a plan, a memory estimate or a conversion can be made without building the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Sharding = Literal["column", "row", "vocabulary", "replicate"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. ``kind`` is Hugging Face's ``rope_type``; the other fields belong to some kinds.

    ``factor`` divides frequencies (linear, llama3); ``low_freq_factor``, ``high_freq_factor`` and
    ``original_max_position_embeddings`` bound llama3's band of interpolated wavelengths.
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides the decoder's mathematics. Field names are Hugging Face's where it has one.

    ``windows[i]`` is layer i's sliding window: a token sees itself and ``windows[i] - 1`` tokens before it;
    None = the whole document before it. ``qkv_bias`` and ``o_bias`` are the attention projections' biases,
    ``qk_norm`` is an RMS norm over each head of the query and the key.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]

    @property
    def attention_scale(self) -> float:
        """Factor on the query-key products before the softmax."""
        return float(self.head_dim) ** -0.5


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of a family, and how it meets Hugging Face files.

    ``weight_map`` pairs our parameter names with Hugging Face's; ``{n}`` stands for the layer number.
    ``sharding_plan`` says for our weight names (same patterns) along which dimension tensor parallelism cuts them.
    ``hf_config`` is the folder's config.json as it was read; export writes it back.
    """

    family: str
    config: DecoderConfig
    weight_map: tuple[tuple[str, str], ...]
    sharding_plan: Mapping[str, Sharding]
    hf_config: Mapping[str, Any] = field(default_factory=dict)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Our parameter name -> shape, in the decoder's order. A tied head has no entry of its own."""
        return parameter_shapes(self.config)

    def hf_names(self) -> dict[str, str]:
        """Our parameter name -> Hugging Face tensor name, for every parameter of this model."""
        table = dict(self.weight_map)
        return {name: table[layer_pattern(name)].format(n=layer_number(name)) for name in self.parameter_shapes()}

    def sharding_of(self, name: str) -> Sharding:
        """How the parameter ``name`` is cut by tensor parallelism."""
        return self.sharding_plan[layer_pattern(name)]


_LAYER = re.compile(r"^layers\.(\d+)\.")


def layer_pattern(name: str) -> str:
    """``layers.3.mlp.up_proj.weight`` -> ``layers.{n}.mlp.up_proj.weight``."""
    return _LAYER.sub("layers.{n}.", name)


def layer_number(name: str) -> int | None:
    """The layer of a parameter, None for those outside the layers."""
    found = _LAYER.match(name)
    return int(found.group(1)) if found else None


def layer_parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name inside one layer -> shape (linear weights are [out, in], as torch and Hugging Face keep them)."""
    hidden, forward = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    linears = {
        "attention.q_proj": (query, hidden, config.qkv_bias),
        "attention.k_proj": (key, hidden, config.qkv_bias),
        "attention.v_proj": (key, hidden, config.qkv_bias),
        "attention.o_proj": (hidden, query, config.o_bias),
        "mlp.gate_proj": (forward, hidden, config.mlp_bias),
        "mlp.up_proj": (forward, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, forward, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"input_norm.weight": (hidden,)}
    for name, (rows, columns, bias) in linears.items():
        if name == "mlp.gate_proj":
            if config.qk_norm:
                shapes["attention.q_norm.weight"] = (config.head_dim,)
                shapes["attention.k_norm.weight"] = (config.head_dim,)
            shapes["post_attention_norm.weight"] = (hidden,)
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter name -> shape for the whole decoder."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        for name, shape in layer_parameter_shapes(config).items():
            shapes[f"layers.{layer}.{name}"] = shape
    shapes["norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def parameter_count(config: DecoderConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(_numel(shape) for shape in parameter_shapes(config).values())


def matmul_parameters(spec: ModelSpec) -> tuple[int, int]:
    """(body, head): parameters that take part in a matrix product per token.

    The embedding lookup is no product and is not counted; the output head is, tied or not. Norms and biases are
    not products. A training step costs 6 FLOPs per token and body parameter, and 6 per *supervised* token and head
    parameter, besides attention.
    """
    config = spec.config
    per_layer = sum(_numel(shape) for shape in layer_parameter_shapes(config).values() if len(shape) == 2)
    return per_layer * config.num_hidden_layers, config.vocab_size * config.hidden_size


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
