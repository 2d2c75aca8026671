"""What fields of a config.json may mean, by the words in their names and what changing them does.

Every reading is a piece of source for the family file, and the gate decides between readings. No family is known
here, only what people call things.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_lib.conversion.brief import Brief
from posttrain_lib.models.families.fields import HARMLESS, INERT

#: fields that the shared reading of sizes takes
SIZES = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    max_position_embeddings rms_norm_eps tie_word_embeddings
    """.split()  # noqa: SIM905
)
ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
LAYER_TYPES = "layer_types"
_WINDOW = re.compile(r"(^|_)window(_size)?$")
_EXPERTS = re.compile(r"^(num|n)_(local_|routed_)?experts$")
_CHOSEN = re.compile(r"experts_per_tok|top_k_experts|^moe_top_?k$")
_TRAINING_ONLY = re.compile(r"drop|noise|jitter")
_SOFT_CAP = re.compile(r"soft_?cap")
_ATTENTION = re.compile(r"att(entio)?n|query|score|(^|_)qk?(_|$)")
_MULTIPLIER = re.compile(r"multipl|scal|factor|weight|alpha")


@dataclass(frozen=True)
class Value:
    """One reading: source code of it, the fields that it takes, and in words what it says."""

    code: str
    fields: tuple[str, ...] = ()
    why: str = ""


class Fields:
    """The fields of a brief, by what they may be."""

    def __init__(self, brief: Brief) -> None:
        self.config, self.defaults, self.effects = brief.config, brief.defaults, brief.effects
        self.names = [name for name in brief.config if name not in HARMLESS]

    def literal(self, name: str) -> str:
        """``, default`` for a call that reads the field: transformers' own, none where the field must be there."""
        if name not in self.defaults or isinstance(self.defaults[name], dict | list):
            return ""
        return f", {self.defaults[name]!r}"

    def boolean(self, name: str) -> Value:
        """A flag."""
        return Value(f"fields.boolean({quoted(name)}{self.literal(name)})", (name,))

    def optional(self, name: str) -> str:
        """Source of a number that may be null."""
        default = "" if self.defaults.get(name) is None else self.literal(name)
        return f"fields.optional_number({quoted(name)}{default})"

    @property
    def window(self) -> str | None:
        """The field of the sliding window's width."""
        return next((name for name in self.names if _WINDOW.search(name)), None)

    @property
    def window_flag(self) -> str | None:
        """The field that turns windows on."""
        return next((n for n in self.names if "window" in n and isinstance(self.config[n], bool)), None)

    @property
    def experts(self) -> tuple[str, ...]:
        """Fields with the number of experts."""
        return tuple(name for name in self.names if _EXPERTS.search(name))

    @property
    def chosen(self) -> str | None:
        """The field with the number of experts that a token goes through."""
        return next((name for name in self.names if _CHOSEN.search(name)), None)

    @property
    def renormalise(self) -> str | None:
        """The flag that makes the chosen experts' weights sum to one."""
        return next((n for n in self.names if "norm" in n and re.search("top_?k|prob", n)), None)

    @property
    def activation(self) -> tuple[str, ...]:
        """Fields that name an activation."""
        return tuple(n for n in self.names if re.search("act(ivation)?(_fn)?$", n) and isinstance(self.config[n], str))

    @property
    def position_flags(self) -> str | None:
        """A list that says of each layer whether it has positions."""
        layers = self.config["num_hidden_layers"]
        fitting = (n for n in self.names if "rope" in n and isinstance(self.config[n], list))
        return next((name for name in fitting if len(self.config[name]) == layers), None)

    @property
    def clip(self) -> str | None:
        """The bound on query, key and value."""
        return next((name for name in self.names if re.search("clip.*qkv|qkv.*clip", name)), None)

    def governed(self, word: str) -> str | None:
        """The flag that decides whether parameters with ``word`` in their name have a bias."""
        flags = [n for n in self.names if "bias" in n and isinstance(self.config[n], bool)]
        for name in flags:
            effect = self.effects.get(name)
            if effect is not None and any(word in p and p.endswith("bias") for p in effect.parameters):
                return name
        return None

    def numbers(self) -> Iterator[str]:
        """Fields with a number, or with none, that no size is and that say nothing of training."""
        taken = SIZES | ROPE | set(self.experts) | {self.chosen, self.window, self.clip}
        for name in self.names:
            value = self.config[name]
            free = name not in taken and name not in INERT and not _TRAINING_ONLY.search(name)
            if free and not isinstance(value, bool) and (value is None or isinstance(value, int | float)):
                yield name

    def readings(self, role: str) -> tuple[list[Value], list[Value]]:
        """(readings of numbers whose words are those of the ``role``, of others that have an effect)."""
        if role.endswith("softcap"):
            wanted = [n for n in self.numbers() if _SOFT_CAP.search(n) and _is_of(n, role)]
            return [Value(self.optional(n), (n,)) for n in wanted], []
        likely, others = [], []
        for name in self.numbers():
            if isinstance(self.config[name], int | float) and not _SOFT_CAP.search(name):
                acts = name in self.effects and self.effects[name].result == "differs"
                if _is_of(name, role) and (_MULTIPLIER.search(name) or acts):
                    likely += self.forms(name, role)
                elif acts:
                    others += self.forms(name, role)
        return likely, others

    def forms(self, name: str, role: str) -> list[Value]:
        """A number as it is, its inverse, and the inverse of its root, the likelier first."""
        read = f"fields.number({quoted(name)}{self.literal(name)})"
        plain, inverse = Value(read, (name,)), Value(f"1.0 / {read}", (name,))
        root = Value(f"{read} ** -0.5", (name,))
        if "scalar" in name:
            return [root, plain, inverse]
        return [inverse, plain, root] if name.endswith("scaling") and role == "logit_scale" else [plain, inverse, root]

    def unread(self, read: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(code, comment) for every field that nothing reads: none may be silently ignored."""
        known = {*read, *ROPE, *SIZES}
        for name in self.names:
            value, effect = self.config[name], self.effects.get(name)
            if name in known or (name in INERT and value in INERT[name]):
                continue
            if _TRAINING_ONLY.search(name):
                yield f"fields.one_of({quoted(name)}, (0, 0.0), 0.0)", "acts in training only"
            elif effect is not None and effect.result == "same":
                yield f"fields.skip({quoted(name)})", f"{effect.change} changes nothing in the reference"
            else:
                fallback = f", {self.defaults[name]!r}" if self.defaults.get(name, self) == value else ""
                yield f"fields.one_of({quoted(name)}, ({value!r},){fallback})", "only this value was verified"


def quoted(text: str) -> str:
    """A string literal in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_of(name: str, role: str) -> bool:
    """Whether a field's words are those of the role."""
    of_attention = bool(_ATTENTION.search(name))
    if role in ("scale", "softcap"):
        return of_attention
    if role == "embedding_scale":
        return "emb" in name
    if role == "residual_scale":
        return "resid" in name
    return not of_attention and bool(re.search("logit|lm_head|output|final", name))


def period_of(kinds: list[str]) -> str | None:
    """A pattern of layers as source, from ``layer`` to its kind; None where two kinds do not alternate regularly."""
    for every in range(2, 9):
        for one, other in (("sliding_attention", "full_attention"), ("full_attention", "sliding_attention")):
            if len(kinds) > every and kinds == [one if (n + 1) % every else other for n in range(len(kinds))]:
                return f"{quoted(one)} if (layer + 1) % {every} else {quoted(other)}"
    return None


def sparse_layers(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Readings of which layers are mixtures, as source with ``layer``: expression -> layers."""
    layers = range(config["num_hidden_layers"])
    every, dense = config.get("decoder_sparse_step"), config.get("mlp_only_layers")
    first = config.get("first_k_dense_replace")
    found = {"True": list(layers)}
    if isinstance(first, int):
        found["layer >= first"] = [n for n in layers if n >= first]
    if isinstance(every, int) and isinstance(dense, list):
        found["layer not in dense and (layer + 1) % every == 0"] = [
            n for n in layers if n not in dense and (n + 1) % every == 0
        ]
    return found
