"""Bytes that a decoder block keeps for its backward, per token, counted from the spec.

The block's forward is followed with values in place of tensors: each has entries per token and bytes per entry, and
each operation records what its backward reads, as autograd and our own functions keep it (``ops``). A tensor that
several operations keep counts once. What a recomputing block keeps (``parallel.recomputation``) is recorded beside it.

Tests hold the count against the storages that are alive after the forward of real blocks of every family.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from posttrain_lib.models.spec import (
    AttentionConfig,
    DecoderConfig,
    ExpertsConfig,
    GatedDeltaConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
)

Recomputation = Literal["none", "selective", "full"]
_WIDE = 4  # float32: the stream between blocks, statistics
_INDEX = 8  # int64
#: tokens that the delta rule solves together (``ops.gated_delta``)
_CHUNK = 64
#: queries of a document that go through one masked call (``ops.attention_pieces``)
_QUERIES = 256
_Kernel = Literal["plain", "sinks", "cap"]
#: ``selective`` keeps products that sum over more than this part of the hidden size (``parallel.recomputation``)
_NARROW = 1 / 8


@dataclass(frozen=True)
class Setting:
    """How a block runs.

    ``product_bytes``: of an entry of matrix products, 2 under autocast. ``weight_bytes``: of an entry of the weights
    as they lie; where it is more, autocast casts each weight and the copy is kept for the backward. ``cuda``: fused
    kernels run. ``trained``: the weights have gradients of their own. ``adapter_rank``: of adapters on every
    projection, 0 = none. ``tensor``: ranks that share heads, features and vocabulary. ``documents``: of a row, of
    ``longest`` tokens at most; on a CPU each keeps results, and masks where it is longer than a window, of its own.
    ``emulated``: a CPU without arithmetic in half precision (attention and experts are computed in float32).
    """

    product_bytes: int = 4
    weight_bytes: int = 4
    cuda: bool = False
    trained: bool = True
    adapter_rank: int = 0
    tensor: int = 1
    documents: int = 1
    longest: int = 1
    emulated: bool = False


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of so many entries a token."""

    entries: float
    itemsize: int


@dataclass(frozen=True)
class Kept:
    """What one block keeps: bytes a token, and bytes whatever the tokens (copies of weights), by recomputation."""

    per_token: dict[Recomputation, float]
    fixed: dict[Recomputation, float]


@dataclass
class _Trace:
    """What a forward keeps; ``results`` is what ``selective`` does."""

    setting: Setting
    hidden: int
    kept: dict[Value, None] = field(default_factory=dict)
    results: dict[Value, None] = field(default_factory=dict)
    always: dict[Value, None] = field(default_factory=dict)  # by every kind of recomputation
    copies: float = 0.0  # bytes of cast weights

    def keep(self, *values: Value) -> None:
        """For the backward."""
        self.kept.update(dict.fromkeys(values))

    def cast(self, value: Value) -> Value:
        """In the dtype of products; a copy where it is not."""
        size = self.setting.product_bytes
        return value if value.itemsize == size else Value(value.entries, size)

    def norm(self, value: Value, *, late_cast: bool, rows: float = 1.0) -> Value:
        """RMS norm over ``rows`` vectors a token."""
        self.keep(value, Value(rows, _WIDE))
        # float32 weights multiply what is rounded to half precision, and the product is float32
        return Value(value.entries, value.itemsize if late_cast else max(value.itemsize, self.setting.weight_bytes))

    def linear(self, value: Value, inputs: float, outputs: float, *, weight: float | None = None) -> Value:
        """A projection of ``inputs`` to ``outputs``; ``weight``: its entries where they are not the product of both."""
        setting = self.setting
        result = Value(outputs, setting.product_bytes)
        self._product(value, result, inputs, inputs * outputs if weight is None else weight, setting.trained)
        if setting.adapter_rank:
            rank = float(setting.adapter_rank)
            low, added = Value(rank, setting.product_bytes), Value(outputs, setting.product_bytes)
            self._product(value, low, inputs, inputs * rank, trained=True)
            self._product(low, added, rank, rank * outputs, trained=True)
        return result

    def _product(self, value: Value, result: Value, inputs: float, weight: float, trained: bool) -> None:
        if trained:
            self.keep(self.cast(value))
        if self.setting.weight_bytes != self.setting.product_bytes:
            self.copies += weight * self.setting.product_bytes
        if inputs > _NARROW * self.hidden:
            self.results[result] = None

    def gated(self, gate: Value, up: Value, activation: str) -> Value:
        """The activation of a feed-forward."""
        product = Value(gate.entries, gate.itemsize)
        self.keep(gate, up)
        if activation == "clamped_swiglu":  # plain operations everywhere
            self.keep(*(Value(gate.entries, gate.itemsize) for _ in range(4)))
        elif not self.setting.cuda:
            self.keep(Value(gate.entries, gate.itemsize))
        return product


def block_kept(config: DecoderConfig, layer: LayerConfig, setting: Setting) -> Kept:
    """What a block keeps between its forward and its backward; its output belongs to the next one."""
    trace = _Trace(setting, config.hidden_size)
    late = config.norm.late_cast
    stream = Value(config.hidden_size, _WIDE)
    inner = trace.norm(stream, late_cast=late) if "pre_attention" in layer.norms else stream
    added = _attention(trace, inner, layer.attention, late)
    if "post_attention" in layer.norms:
        added = trace.norm(added, late_cast=late)
    middle = Value(config.hidden_size, _WIDE)
    inner = trace.norm(middle, late_cast=late) if "pre_mlp" in layer.norms else middle
    added = _mlp(trace, inner, layer.mlp) if isinstance(layer.mlp, MLPConfig) else _experts(trace, inner, layer.mlp)
    if "post_mlp" in layer.norms:
        trace.norm(added, late_cast=late)
    return Kept(
        {
            "none": _total(trace.kept),
            "selective": _total({stream: None, **trace.results, **trace.always}),
            "full": _total({stream: None, **trace.always}),
        },
        {"none": trace.copies, "selective": 0.0, "full": 0.0},
    )


def _total(values: Iterable[Value]) -> float:
    return sum(value.entries * value.itemsize for value in values)


def _attention(
    trace: _Trace, hidden: Value, own: AttentionConfig | LatentAttentionConfig | GatedDeltaConfig, late: bool
) -> Value:
    if isinstance(own, GatedDeltaConfig):
        return _gated_delta(trace, hidden, own)
    if isinstance(own, LatentAttentionConfig):
        return _latent(trace, hidden, own, late)
    parts = 1 if own.qk_norm == "projection" else trace.setting.tensor  # such layers stay whole
    size = float(trace.hidden)
    heads, groups = own.num_attention_heads / parts, own.num_key_value_heads / parts
    queries, keys = heads * own.head_dim, groups * own.head_dim
    query = trace.linear(hidden, size, queries * (2 if own.gated else 1))
    key, value = trace.linear(hidden, size, keys), trace.linear(hidden, size, keys)
    gate = Value(queries, query.itemsize) if own.gated else None
    if own.gated:
        query = Value(queries, query.itemsize)
    if own.qk_norm == "projection":
        query, key = trace.norm(query, late_cast=late), trace.norm(key, late_cast=late)
    if own.clip is not None:
        trace.keep(query, key, value)
        query, key, value = (Value(part.entries, part.itemsize) for part in (query, key, value))
    before = own.qk_norm == "head" and not own.qk_norm_after_rope
    if before:
        query = trace.norm(query, late_cast=late, rows=heads)
        key = trace.norm(key, late_cast=late, rows=groups)
    if own.rope is not None:
        query, key = Value(query.entries, query.itemsize), Value(key.entries, key.itemsize)
    if own.qk_norm == "head" and not before:
        query = trace.norm(query, late_cast=late, rows=heads)
        key = trace.norm(key, late_cast=late, rows=groups)
    if not trace.setting.cuda and not own.sinks and own.softcap is None and own.window is not None:
        _mask(trace, own.window)
    kind: _Kernel = "cap" if own.softcap is not None else "sinks" if own.sinks else "plain"
    mixed = _kernel(trace, query, key, value, heads, queries, kind)
    if gate is not None:
        opened = Value(queries, gate.itemsize)
        trace.keep(mixed, opened)
        mixed = Value(queries, mixed.itemsize)
    return trace.linear(mixed, queries, size)


def _mask(trace: _Trace, window: int) -> None:
    """A CPU keeps the mask of some queries at a time where a document is longer than the window."""
    longest = trace.setting.longest
    if longest > window:
        size = _WIDE if trace.setting.emulated else trace.setting.product_bytes
        trace.keep(Value(min(longest, _QUERIES + window), size))


def _kernel(trace: _Trace, query: Value, key: Value, value: Value, heads: float, width: float, kind: _Kernel) -> Value:
    """Attention itself. ``width``: entries of the result as it is kept."""
    setting = trace.setting
    size = setting.product_bytes
    wide = _WIDE if setting.emulated and not setting.cuda else size
    statistics = Value(heads, _WIDE)
    result = Value(width, wide)
    if wide == size:
        trace.keep(*(trace.cast(part) for part in (query, key, value)))
    else:
        trace.keep(*(Value(part.entries, wide) for part in (query, key, value)))
    if kind != "cap" or setting.cuda:
        trace.keep(result, statistics)
    if kind == "plain" or (kind == "sinks" and not setting.cuda):  # all else is computed again
        trace.results.update({result: None, statistics: None})
    if wide != size or (setting.documents > 1 and not setting.cuda and kind == "plain"):
        return Value(width, size)  # rounded, or the documents' results laid end to end: another tensor
    return result


def _latent(trace: _Trace, hidden: Value, own: LatentAttentionConfig, late: bool) -> Value:
    size, heads = float(trace.hidden), own.num_attention_heads / trace.setting.tensor
    turned = own.rope.dims
    wide, narrow = heads * (own.nope_dim + turned), heads * own.value_dim
    if own.q_rank is None:
        trace.linear(hidden, size, wide)
    else:
        inner = trace.norm(trace.linear(hidden, size, own.q_rank), late_cast=late)
        trace.linear(inner, own.q_rank, wide)
    latent = trace.linear(hidden, size, own.kv_rank + turned)
    normed = trace.norm(latent, late_cast=late)
    expanded = trace.linear(Value(own.kv_rank, normed.itemsize), own.kv_rank, heads * (own.nope_dim + own.value_dim))
    query, key = (Value(wide, trace.setting.product_bytes) for _ in range(2))
    # narrower values are filled up to the keys' width; values of that width stay where they were expanded
    padded = own.value_dim != own.nope_dim + turned
    value = Value(max(wide, narrow), trace.setting.product_bytes) if padded else expanded
    mixed = _kernel(trace, query, key, value, heads, max(wide, narrow), "plain")
    if padded:
        mixed = Value(narrow, mixed.itemsize)
    return trace.linear(mixed, narrow, size)


def _gated_delta(trace: _Trace, hidden: Value, own: GatedDeltaConfig) -> Value:
    """The rule itself runs in float32, chunk by chunk: a table of tokens times tokens of a chunk, and a memory a head
    and chunk, beside what is as wide as queries, keys and values."""
    size, heads = float(trace.hidden), float(own.num_value_heads)
    keys, values = float(own.num_key_heads * own.key_dim), heads * own.value_dim
    channels = 2 * keys + values
    projected = trace.linear(hidden, size, channels + values)
    trace.linear(hidden, size, 2 * heads)
    width = trace.setting.product_bytes
    trace.keep(Value(channels, width), Value(channels, _WIDE), Value(channels, _WIDE))  # convolution and activation
    # 11 as wide as keys of every value head (lengths, scale, decays), 4 as values, 6 tables of a chunk, 2 memories
    wide = heads * own.key_dim
    trace.keep(Value(11 * wide + 4 * values + 6 * heads * _CHUNK, _WIDE))
    trace.keep(Value(2 * wide * own.value_dim / _CHUNK, _WIDE))
    normed = trace.norm(Value(values, width), late_cast=False, rows=heads)
    trace.keep(normed, Value(values, _WIDE), Value(values, _WIDE), projected)
    return trace.linear(Value(values, normed.itemsize), values, size)


def _mlp(trace: _Trace, hidden: Value, own: MLPConfig) -> Value:
    size, forward = float(trace.hidden), own.intermediate_size / trace.setting.tensor
    gate, up = trace.linear(hidden, size, forward), trace.linear(hidden, size, forward)
    return trace.linear(trace.gated(gate, up, own.activation), forward, size)


def _experts(trace: _Trace, hidden: Value, own: ExpertsConfig) -> Value:
    size, chosen, setting = float(trace.hidden), float(own.top_k), trace.setting
    trace.linear(hidden, size, own.num_experts)
    trace.keep(Value(own.num_experts, _WIDE), Value(chosen, _INDEX), Value(2 * chosen, _WIDE))  # scores, ids, weights
    places = Value(4 * chosen, _INDEX)  # of pairs, sorted by expert; recomputation does not let go of them
    trace.keep(places)
    trace.always[places] = None
    before = dict(trace.results)
    rows, forward = Value(chosen * size, setting.product_bytes), chosen * own.intermediate_size
    one = own.num_experts * size * own.intermediate_size  # whole copies of the weights are cast, whoever is chosen
    gate, up = trace.linear(rows, size, forward, weight=one), trace.linear(rows, size, forward, weight=one)
    product = trace.gated(gate, up, own.activation)
    out = trace.linear(product, own.intermediate_size, chosen * size, weight=one)
    trace.keep(out)
    if not setting.cuda:  # the loop over experts is computed again, but for products in another precision than asked
        trace.results = before
        if setting.emulated and setting.product_bytes < _WIDE:
            trace.results[Value(2 * forward, _WIDE)] = None
            if own.intermediate_size > _NARROW * size:
                trace.results[Value(chosen * size, _WIDE)] = None
    if own.shared is not None:
        shared = _mlp(trace, hidden, own.shared)
        if own.shared_gate:
            trace.linear(hidden, size, 1)
            trace.keep(shared, Value(1, _WIDE))
    return Value(size, setting.product_bytes)
