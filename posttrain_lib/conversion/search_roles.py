"""What each stored tensor is, by its shape first and the words in its name second."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain_lib.conversion.brief import folded
from posttrain_lib.models.spec import ALL_NORMS, POST_NORMS, PRE_NORMS, NormPlace
from posttrain_lib.models.weights import Rule, Shape

#: role -> words of it, as parts of a name
_WORDS: dict[str, tuple[str, ...]] = {
    "q_proj": ("q_proj", "wq", "query", "q_lin"),
    "k_proj": ("k_proj", "wk", "key", "k_lin"),
    "v_proj": ("v_proj", "wv", "value", "v_lin"),
    "o_proj": ("o_proj", "wo", "out_proj", "out_lin", "dense", "c_proj"),
    "gate_proj": ("gate_proj", "w1", "wi_0", "gate"),
    "up_proj": ("up_proj", "w3", "wi_1", "up"),
    "down_proj": ("down_proj", "w2", "down", "c_proj", "fc2"),
}
_QKV, _GATE_UP = re.compile(r"qkv|query_key_value|c_attn"), re.compile(r"gate_up|w13|gate_and_up")
_ATTENTION = re.compile(r"attn|attention")
#: the word in a norm's name, and how well it says each place
_PLACE_WORDS: tuple[tuple[str, dict[NormPlace, int]], ...] = (
    (r"^(input|pre_attn|pre_attention|attn_norm|attention_norm|ln_1)", {"pre_attention": 3}),
    (r"^post_(self_)?attn", {"post_attention": 3, "pre_mlp": 1}),
    (r"^post_attention", {"post_attention": 2, "pre_mlp": 2}),
    (r"^(pre_feedforward|pre_mlp|pre_ffn|ffn_norm|mlp_norm|ln_2)", {"pre_mlp": 3}),
    (r"^post_(feedforward|mlp|ffn)", {"post_mlp": 3}),
)


@dataclass(frozen=True)
class Stored:
    """Tensors of one pattern: shape, and the layers that have one."""

    name: str
    shape: Shape
    layers: tuple[int, ...]

    @property
    def inside(self) -> str:
        """The name within its layer."""
        return self.name.partition(".{n}.")[2]


@dataclass
class Roles:
    """The stored tensors by what they are.

    ``rules`` are those that shapes and names leave no doubt about; ``norms`` are those of the stream, whose places are
    to be found; ``pairs``: rules of gate and up by the better guess, ``swapped`` the other way about; ``unknown``:
    those without a role.
    """

    rules: list[Rule] = field(default_factory=list)
    norms: list[Stored] = field(default_factory=list)
    pairs: list[tuple[Rule, ...]] = field(default_factory=list)
    swapped: list[tuple[Rule, ...]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """What the shapes are made of. ``head_dim`` may be inferred from them."""

    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    experts: int | None
    layers: int


def find_roles(tensors: Mapping[str, Shape], sizes: Sizes) -> Roles:
    """Every stored tensor and its role."""
    roles = Roles()
    stored = [
        Stored(name, tuple(entry["shape"]), tuple(entry.get("layers", ()))) for name, entry in folded(tensors).items()
    ]
    groups: dict[str, list[Stored]] = {}
    for item in stored:
        if item.layers:
            groups.setdefault(_parent(item), []).append(item)
        else:
            _outside(item, sizes, roles)
    for parent, items in groups.items():
        if any(".{e}." in item.name or item.name.endswith(".{e}") for item in items) or _is_stacked(items, sizes):
            _experts(items, sizes, roles)
        elif _ATTENTION.search(parent):
            _attention(items, sizes, roles)
        else:
            _others(parent, items, sizes, roles)
    return roles


def _parent(item: Stored) -> str:
    """The module that a tensor's module is part of."""
    parts = item.inside.split(".")
    if ".{e}." in item.name:
        return item.inside.partition(".{e}.")[0]
    return ".".join(parts[:-2]) if parts[-1] in ("weight", "bias") else ".".join(parts[:-1])


def _outside(item: Stored, sizes: Sizes, roles: Roles) -> None:
    if len(item.shape) == 1 and item.shape[0] == sizes.hidden:
        ours = "norm.weight"
    elif len(item.shape) == 2 and "embed" in item.name:
        ours = "embed_tokens.weight"
    elif len(item.shape) == 2 and ("head" in item.name or "output" in item.name):
        ours = "lm_head.weight"
        roles.facts["head"] = True
    else:
        roles.unknown.append(item.name)
        return
    roles.rules.append(Rule((ours,), item.name))


def _module(item: Stored) -> str:
    parts = item.inside.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]


def _worded(item: Stored, names: tuple[str, ...]) -> str | None:
    """The role among ``names`` whose word is the module's name, or part of it."""
    module = _module(item)
    for role in names:
        if module in _WORDS[role]:
            return role
    return next((role for role in names if any(word in module for word in _WORDS[role])), None)


def _ours(inside: str) -> str:
    return f"layers.{{n}}.{inside}"


def _attention(items: list[Stored], sizes: Sizes, roles: Roles) -> None:
    queries, keys = sizes.heads * sizes.head_dim, sizes.key_value_heads * sizes.head_dim
    for item in items:
        module, kind = _module(item), item.inside.rpartition(".")[2]
        if "norm" in module and len(item.shape) == 1 and kind == "weight":
            _qk_norm(item, module, sizes, roles)
        elif item.shape == (sizes.heads,) and kind not in ("weight", "bias"):
            roles.facts["sinks"] = True
            roles.rules.append(Rule((_ours("attention.sinks"),), item.name))
        elif _QKV.search(module) and item.shape[0] == queries + 2 * keys:
            roles.rules.append(Rule(tuple(_ours(f"attention.{name}_proj.{kind}") for name in "qkv"), item.name, "rows"))
            roles.facts[f"qkv_{kind}"] = True
        elif (role := _worded(item, ("q_proj", "k_proj", "v_proj", "o_proj"))) and kind in ("weight", "bias"):
            roles.rules.append(Rule((_ours(f"attention.{role}.{kind}"),), item.name))
            roles.facts[f"{'o' if role == 'o_proj' else 'qkv'}_{kind}"] = True
            if role == "q_proj" and kind == "weight" and item.shape[0] == 2 * queries:
                roles.facts["gated"] = True
        else:
            roles.unknown.append(item.name)


def _qk_norm(item: Stored, module: str, sizes: Sizes, roles: Roles) -> None:
    part = "q" if module.startswith("q") else "k" if module.startswith("k") else None
    if part is None:
        roles.unknown.append(item.name)
        return
    whole = (sizes.heads if part == "q" else sizes.key_value_heads) * sizes.head_dim
    roles.facts["qk_norm"] = "head" if item.shape == (sizes.head_dim,) else "projection"
    if item.shape[0] not in (sizes.head_dim, whole):
        roles.unknown.append(item.name)
    roles.rules.append(Rule((_ours(f"attention.{part}_norm.weight"),), item.name))


def _others(parent: str, items: list[Stored], sizes: Sizes, roles: Roles) -> None:
    """Norms of the stream, feed-forwards, routers."""
    shared = "shared" in parent
    weights = []
    for item in items:
        kind = item.inside.rpartition(".")[2]
        if len(item.shape) == 1 and item.shape[0] == sizes.hidden and "norm" in _module(item):
            roles.norms.append(item)
        elif item.shape == (sizes.experts, sizes.hidden) and kind == "weight":
            roles.rules.append(Rule((_ours("mlp.router.weight"),), item.name))
        elif item.shape == (sizes.experts,) and kind == "bias":
            roles.rules.append(Rule((_ours("mlp.router.bias"),), item.name))
            roles.facts["router_bias"] = True
        elif item.shape == (1, sizes.hidden) and "shared" in item.inside:
            roles.rules.append(Rule((_ours("mlp.shared_gate.weight"),), item.name))
            roles.facts["shared_gate"] = True
        elif kind in ("weight", "bias"):
            weights.append(item)
        else:
            roles.unknown.append(item.name)
    if weights:
        _feed_forward(weights, "mlp.shared" if shared else "mlp", sizes, roles)
        roles.facts["shared" if shared else "dense"] = [item for item in weights if item.inside.endswith("weight")]


def _feed_forward(items: list[Stored], ours: str, sizes: Sizes, roles: Roles) -> None:
    gates, ups = list[Rule](), list[Rule]()
    for item in items:
        module, kind = _module(item), item.inside.rpartition(".")[2]
        role = _worded(item, ("down_proj", "up_proj", "gate_proj"))
        if kind == "bias" and not ours.endswith("shared"):
            roles.facts["mlp_bias"] = True
        if _GATE_UP.search(module):
            names = tuple(_ours(f"{ours}.{name}.{kind}") for name in ("gate_proj", "up_proj"))
            gates.append(Rule(names, item.name, "rows"))
        elif role == "down_proj":
            roles.rules.append(Rule((_ours(f"{ours}.down_proj.{kind}"),), item.name))
        elif role is not None:
            (gates if role == "gate_proj" else ups).append(Rule((_ours(f"{ours}.{role}.{kind}"),), item.name))
        else:
            roles.unknown.append(item.name)
    _pair((*gates, *ups), roles)


def _pair(rules: tuple[Rule, ...], roles: Roles) -> None:
    """Gate and up as they seem to be, and the other way about."""
    if rules:
        roles.pairs.append(rules)
        roles.swapped.append(tuple(_exchanged(rule) for rule in rules))


def _exchanged(rule: Rule) -> Rule:
    def other(name: str) -> str:
        if "gate_" in name:
            return name.replace("gate_", "up_")
        return name.replace("up_", "gate_")

    return Rule(tuple(other(name) for name in rule.ours), rule.theirs, rule.how, rule.float32)


def _is_stacked(items: list[Stored], sizes: Sizes) -> bool:
    return any(len(item.shape) == 3 and item.shape[0] == sizes.experts for item in items)


def _experts(items: list[Stored], sizes: Sizes, roles: Roles) -> None:
    pair: list[Rule] = []
    roles.facts["mixture"] = items
    for item in items:
        module = _module(item) if ".{e}." in item.name else item.inside.rpartition(".")[2]
        stacked = ".{e}." not in item.name
        bias = item.inside.endswith("bias")
        role = next((r for r in ("down_proj", "up_proj", "gate_proj") if any(w in module for w in _WORDS[r])), None)
        fused = bool(_GATE_UP.search(module))
        if bias:
            roles.facts["experts_bias"] = True
        if fused and stacked and (bias or item.shape[1] == sizes.hidden):
            ends = ("gate_bias", "up_bias") if bias else ("gate_proj", "up_proj")
            pair.append(Rule(tuple(_ours(f"mlp.experts.{end}") for end in ends), item.name, "alternating"))
        elif role is None or fused or (bias and not stacked):
            roles.unknown.append(item.name)
        else:
            name = _ours(f"mlp.experts.{role.replace('_proj', '_bias') if bias else role}")
            outward = item.shape[-1] if role == "down_proj" else item.shape[-2] if len(item.shape) > 1 else None
            turned = stacked and not bias and outward == sizes.hidden
            rule = Rule((name,), item.name, "transposed" if turned else "same" if stacked else "experts")
            (roles.rules if role == "down_proj" else pair).append(rule)
    _pair(tuple(pair), roles)


def norm_places(norms: list[Stored]) -> Iterator[dict[str, NormPlace]]:
    """Stored norm -> place, the likeliest assignment first: by the words in the names, then by what is usual."""
    usual = {frozenset(PRE_NORMS): 2, frozenset(POST_NORMS): 1, frozenset(ALL_NORMS): 2}

    def score(places: tuple[NormPlace, ...]) -> tuple[int, int]:
        words = sum(_place_score(item, place) for item, place in zip(norms, places, strict=True))
        return words, usual.get(frozenset(places), 0)

    for places in sorted(itertools.permutations(ALL_NORMS, len(norms)), key=score, reverse=True):
        yield {item.name: place for item, place in zip(norms, places, strict=True)}


def _place_score(item: Stored, place: NormPlace) -> int:
    module = _module(item)
    return next((said.get(place, 0) for word, said in _PLACE_WORDS if re.search(word, module)), 1)
