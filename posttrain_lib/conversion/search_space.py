"""The choices that a definition is made of, each with its readings in the order of likelihood, and what may say which.

A choice names the modules in whose comparison a wrong reading first shows; the search changes only those choices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_lib.conversion.brief import Brief
from posttrain_lib.conversion.search_fields import LAYER_TYPES, Fields, Value, sparse_layers
from posttrain_lib.conversion.search_roles import Roles, Sizes, find_roles, norm_places
from posttrain_lib.models.spec import NormPlace

_NO, _YES = Value("False"), Value("True")
#: how many assignments of norms to places are tried at most
_PLACINGS = 6
_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Choice:
    """``values`` by falling likelihood; ``shows``: a pattern of the modules that a wrong one makes wrong first."""

    name: str
    values: tuple[Value, ...]
    shows: str


class NotRepresentableError(Exception):
    """The blocks have no place for something that the folder has."""


@dataclass(frozen=True)
class Space:
    """Everything that may be chosen for one brief."""

    fields: Fields
    sizes: Sizes
    roles: Roles
    places: tuple[Mapping[str, NormPlace], ...]
    choices: tuple[Choice, ...]
    head_dim_stated: bool

    @classmethod
    def of(cls, brief: Brief) -> Space:
        """The space of a brief.

        Raises:
            NotRepresentableError: with the reason.
        """
        fields = Fields(brief)
        sizes, stated = _sizes(brief, fields)
        roles = find_roles(brief.tensors, sizes)
        if roles.unknown:
            raise NotRepresentableError(f"stored tensors without a role: {', '.join(roles.unknown[:6])}")
        if kinds := set(brief.config.get(LAYER_TYPES) or ()) - set(_KINDS):
            raise NotRepresentableError(f"kinds of layers that the search has no block for: {', '.join(sorted(kinds))}")
        places = tuple(place for place, _ in zip(norm_places(roles.norms), range(_PLACINGS), strict=False))
        choices = tuple(choice for choice in _choices(brief, fields, roles, places) if choice.values)
        return cls(fields, sizes, roles, places, choices, stated)

    def first(self) -> dict[str, int]:
        """The likeliest reading of everything."""
        return {choice.name: 0 for choice in self.choices}

    def chosen(self, picks: Mapping[str, int]) -> dict[str, Value]:
        """Choice -> reading."""
        return {choice.name: choice.values[picks[choice.name]] for choice in self.choices}

    def has_place_for(self, picks: Mapping[str, int]) -> bool:
        """Whether the blocks can do it: a norm about one that rounds before it multiplies they cannot."""
        chosen = self.chosen(picks)
        return not chosen["plus_one"] == chosen["other_cast"] == _YES

    def suspects(self, report: Mapping[str, Any]) -> tuple[list[Choice], list[Choice]]:
        """(choices that can be what a report complains of, all others)."""
        names = complaints(report)
        found = [choice for choice in self.choices if any(re.search(choice.shows, name) for name in names)]
        return found, [choice for choice in self.choices if choice not in found]


def complaints(report: Mapping[str, Any]) -> list[str]:
    """The first wrong module, without its layer; where none is, or float32 agrees, the checks that failed: then what is
    wrong is where something is rounded, which the checks tell apart and the modules do not."""
    module = report.get("first_wrong_module")
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    if module is not None and differs_in_float32(report):
        return [re.sub(r"^layers\.\d+$", "layer", re.sub(r"^layers\.\d+\.", "", module))]
    return [f"check {name}" for name in failed]


def differs_in_float32(report: Mapping[str, Any]) -> bool:
    """Whether more than a rounding differs."""
    return any("float32" in check["name"] and not check["passed"] for check in report["checks"])


def _sizes(brief: Brief, fields: Fields) -> tuple[Sizes, bool]:
    config = brief.config
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size")
    if missing := [name for name in needed if not isinstance(config.get(name), int)]:
        raise NotRepresentableError(f"config.json lacks {', '.join(missing)}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    key_value = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim")
    if head_dim is None:
        head_dim = hidden // heads
        rows = {name.rpartition("self_attn.")[2]: shape[0] for name, shape in brief.tensors.items() if shape}
        if rows.get("o_proj.weight") == hidden and (wide := rows.get("q_proj.weight")):
            head_dim = wide // heads
    experts = next((config[name] for name in fields.experts), None)
    sizes = Sizes(hidden, heads, key_value, head_dim, experts, config["num_hidden_layers"])
    return sizes, head_dim == hidden // heads or config.get("head_dim") is not None


def _choices(
    brief: Brief, fields: Fields, roles: Roles, places: tuple[Mapping[str, NormPlace], ...]
) -> Iterator[Choice]:
    usual = Value("1.0")
    yield Choice("plus_one", (_NO, _YES), r"norm$")
    yield Choice("other_cast", (_NO, _YES), r"norm$|check norms, bfloat16")
    numbers = tuple(Value(str(number)) for number in range(len(places)))
    yield Choice("places", numbers, r"_norm$|^layer$|^after_attention$|refused")
    root = Value("sizes.hidden**0.5")
    yield Choice("embedding_scale", _ordered(fields, "embedding_scale", usual, root), r"^embed_tokens")
    yield from _attention(brief, fields, roles)
    yield from _feed_forward(fields, roles)
    yield Choice("residual_scale", _ordered(fields, "residual_scale", usual), r"^layer$|^after_attention$")
    yield Choice("logit_scale", _ordered(fields, "logit_scale", usual), r"^lm_head|check logits")
    yield Choice("logit_softcap", (*fields.readings("logit_softcap")[0], Value("None")), r"^lm_head|check logits")


def _ordered(fields: Fields, role: str, *usual: Value) -> tuple[Value, ...]:
    """Fields whose names say that they are for this, then what is usual, then any number that has an effect."""
    likely, others = fields.readings(role)
    return (*likely[:1], *usual, *likely[1:], *others)


def _attention(brief: Brief, fields: Fields, roles: Roles) -> Iterator[Choice]:
    nested = any(isinstance(v, dict) for v in (brief.config.get("rope_parameters") or {}).values())
    if not nested:
        yield Choice("interleaved", (_NO, _YES), r"^attention$")
        if not _states_partial(brief):
            parts = tuple(Value(part) for part in ("1.0", "0.5", "0.25", "0.75"))
            yield Choice("partial", parts, r"^rotary_embedding")
    if fields.position_flags is not None:
        # A list named for layers without positions has a 1 for those; or is it the other way about?
        without = "no_" in fields.position_flags or "nope" in fields.position_flags
        on, off = Value("rope if turn else None"), Value("None if turn else rope")
        ways = (off, on) if without else (on, off)
        yield Choice("positions", (*ways, Value("rope")), r"^rotary_embedding|^attention$|^attention.[qk]_norm")
    if fields.window is not None:
        by_kind = (Value("kind"),) if brief.config.get(LAYER_TYPES) else ()
        ways = (*by_kind, Value("all"), Value("even"), Value("odd"), Value("none"))
        yield Choice("windows", ways, r"^attention$")
    yield Choice("scale", (*_ordered(fields, "scale", Value("")), Value("1.0")), r"^attention$")
    yield Choice("softcap", (*fields.readings("softcap")[0], Value("None")), r"^attention$")
    if roles.facts.get("qk_norm") == "head":
        yield Choice("qk_norm_after_rope", (_NO, _YES), r"^attention(\.[qk]_norm)?$")


def _states_partial(brief: Brief) -> bool:
    inner = brief.config.get("rope_parameters") or brief.config.get("rope_scaling") or {}
    return "partial_rotary_factor" in brief.config or "partial_rotary_factor" in inner


def _feed_forward(fields: Fields, roles: Roles) -> Iterator[Choice]:
    stated = fields.activation
    named = (Value(f"fields.activation({_quoted_all(stated)})", stated),) if stated else ()
    # What is stated may not be what is computed; then it is more likely something that has no name of its own.
    kinds = tuple(Value(f'"{kind}"') for kind in ("clamped_swiglu", "gelu_tanh", "gelu", "silu"))
    yield Choice("activation", named + (kinds if stated else kinds[::-1]), r"^mlp(\.experts|\.shared)?$")
    if roles.pairs:
        yield Choice("exchanged", (_NO, _YES), r"^mlp(\.experts|\.shared)?$|refused")
    if "mixture" not in roles.facts:
        return
    soft, top = Value('"softmax"'), Value('"softmax_of_top"')
    yield Choice("router", (top,) if roles.facts.get("router_bias") else (soft,), r"^mlp\.router")
    flag = fields.renormalise
    said = () if flag is None else (fields.boolean(flag),)
    if not roles.facts.get("router_bias"):
        yield Choice("renormalise", (*said, _NO, _YES), r"^mlp\.router|^mlp$|^mlp\.experts|routing")
        yield Choice("float_weights", (_NO, _YES), r"bfloat16")
    layers = {layer for item in roles.facts["mixture"] for layer in item.layers}
    fitting = tuple(Value(code) for code, found in sparse_layers(fields.config).items() if set(found) == layers)
    if not fitting:
        raise NotRepresentableError(f"no field says that layers {sorted(layers)} are mixtures of experts")
    yield Choice("sparse", fitting[::-1], r"refused")


def _quoted_all(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)
