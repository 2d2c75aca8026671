"""Reading a config.json strictly: every field is used, known to be harmless, or refused by name.

A field that is silently ignored is a model that trains as something else. Refusing costs a user one line in
config.json; ignoring may cost the run. The logit comparison does not see everything (dropout acts in training only).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from posttrain_lib.errors import ModelError
from posttrain_lib.models.spec import Activation, RopeConfig

REQUIRED = object()
_ORIGINAL = "original_max_position_embeddings"
_SLIDES = "sliding_attention"

# Fields that say nothing about the forward or the training of the decoder.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version _name_or_path name_or_path dtype torch_dtype use_cache
    initializer_range pad_token_id bos_token_id eos_token_id return_dict output_attentions output_hidden_states
    max_length min_length do_sample temperature top_k top_p typical_p repetition_penalty num_beams id2label
    label2id problem_type finetuning_task task_specific_params _attn_implementation attn_implementation
    _attn_implementation_autoset chunk_size_feed_forward is_encoder_decoder tokenizer_class prefix
    decoder_start_token_id num_labels sep_token_id _commit_hash unsloth_version unsloth_fixed base_model_tp_plan
    base_model_pp_plan output_router_logits router_aux_loss_coef auto_map
    """.split()  # noqa: SIM905 - a list of forty quoted lines would be harder to read
)
# Fields allowed only where they change nothing: name -> the values that do.
INERT: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "cross_attention_hidden_size": (None,),
    "add_cross_attention": (False, None),
    "is_decoder": (False, True, None),
    "tie_encoder_decoder": (False, None),
    "torchscript": (False, None),
    "pruned_heads": ({}, None),
    "use_mrope": (False, None),
    "quantization_config": (None,),
}
#: kind -> its fields with defaults; None = there need not be one
_ROPE_KEYS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": REQUIRED},
    "llama3": {"factor": REQUIRED, "low_freq_factor": REQUIRED, "high_freq_factor": REQUIRED, _ORIGINAL: REQUIRED},
    "yarn": {
        "factor": REQUIRED,
        _ORIGINAL: REQUIRED,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
    },
    "longrope": {"factor": None, _ORIGINAL: REQUIRED, "attention_factor": None},
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}


class ConfigReader:
    """Takes fields out of a config.json and remembers which; :meth:`finish` refuses what is left."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._used: set[str] = set()

    def integer(self, name: str, default: Any = REQUIRED, *, minimum: int = 1) -> int:
        """A whole number of at least ``minimum``."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise _wrong(name, value, f"a whole number of at least {minimum}")
        return value

    def same_integer(self, names: Sequence[str], default: Any = REQUIRED) -> int:
        """A whole number of at least 1 under one of several names; where more than one is there, they must agree."""
        found = {name: self.integer(name) for name in names if name in self._content}
        if len(set(found.values())) > 1:
            raise _wrong(names[0], found, "one number")
        return next(iter(found.values())) if found else self.integer(names[0], default)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A positive number."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise _wrong(name, value, "a number above 0")
        return float(value)

    def boolean(self, name: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """A whole number of at least 1, or None where the field is null; ``default`` where it is missing."""
        return None if self._take(name, default) is None else self.integer(name, default)

    def one_of(self, name: str, allowed: Collection[Any], default: Any = REQUIRED) -> Any:
        """A value of a closed set."""
        value = self._take(name, default)
        if value not in allowed:
            raise _wrong(name, value, "one of " + ", ".join(repr(item) for item in allowed))
        return value

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """A positive number, or None where the field is null; ``default`` where it is missing."""
        return None if self._take(name, default) is None else self.number(name, default)

    def integers(self, name: str, count: int | None = None) -> list[int] | None:
        """A list of whole numbers from 0, of this length if one is given; None where the field is missing or null."""
        value = self._take(name, None)
        if value is None:
            return None
        fits = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
        if not fits or count not in (None, len(value)):
            raise _wrong(name, value, f"{'' if count is None else count} whole numbers from 0")
        return list(value)

    def peek(self, name: str) -> Any:
        """A field's value, None where it is missing; it counts as not read yet."""
        return self._content.get(name)

    def activation(self, *names: str, default: str = "silu") -> Activation:
        """The feed-forward's activation, of the first of these fields that is there."""
        found = [(name, self._take(name, None)) for name in names]
        name, value = next((item for item in found if item[1] is not None), (names[0], default))
        if value not in _ACTIVATIONS:
            raise _wrong(name, value, "one of " + ", ".join(repr(item) for item in _ACTIVATIONS))
        return _ACTIVATIONS[value]

    def layer_types(self, layers: int, kinds: Collection[str], default: Callable[[int], str]) -> list[str]:
        """``layer_types``: the kind of each layer; ``default`` gives that of a layer where the field is missing."""
        given = self._take("layer_types", None)
        if given is None:
            return [default(layer) for layer in range(layers)]
        if not isinstance(given, list) or len(given) != layers:
            raise _wrong("layer_types", given, f"{layers} entries, one per layer")
        unknown = sorted(set(map(str, given)) - set(kinds))
        if unknown:
            raise _wrong("layer_types", unknown[0], "one of " + ", ".join(kinds))
        return list(given)

    def rope(
        self,
        head_dim: int,
        positions: int,
        *,
        theta: float = 10_000.0,
        partial: float | None = None,
        interleaved: bool = False,
        original: int | None = None,
        renamed: Mapping[str, str] = MappingProxyType({}),
        usual: Mapping[str, Any] = MappingProxyType({}),
    ) -> RopeConfig:
        """``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before).

        Args:
            head_dim: entries of a head. positions: ``max_position_embeddings``.
            theta, partial: the family's defaults for ``rope_theta`` and ``partial_rotary_factor``. partial None: its
                heads turn whole, and a file that says otherwise is refused.
            original: ``original_max_position_embeddings`` where the family keeps it outside.
            renamed: kinds that the family's older files call otherwise.
            usual: the family's default for ``rope_parameters``.
        """
        given = self._rope_fields(theta, partial, usual)
        for key in ("rope_type", "type"):
            if given.get(key) in renamed:
                given[key] = renamed[given[key]]
        kind = given.get("rope_type", given.get("type", "default"))
        if original is not None and _ORIGINAL in _ROPE_KEYS.get(kind, {}):
            stated = given.setdefault(_ORIGINAL, original)
            if stated != original:
                raise _wrong(f"rope_parameters.{_ORIGINAL}", stated, f"{original}, as the field {_ORIGINAL}")
        return self._one_rope(given, head_dim, positions, interleaved)

    def ropes_by_kind(
        self, head_dim: int, positions: int, thetas: Mapping[str, tuple[str, float]]
    ) -> dict[str, RopeConfig]:
        """One rotary embedding per kind of layer (Gemma-3): ``rope_parameters`` by kind, or the older fields.

        Args:
            thetas: kind -> (field of its theta in older files, default). ``rope_scaling`` belongs to full attention.
        """
        scaling, new = self._take("rope_scaling", None), self._take("rope_parameters", None)
        if scaling and new:
            raise _wrong("rope_scaling", scaling, "only one of rope_scaling and rope_parameters")
        if new and not set(new) & set(thetas):
            raise _wrong("rope_parameters", new, f"one rotary embedding for each of {', '.join(thetas)}")
        old = {kind: self._take(field, default) for kind, (field, default) in thetas.items()}
        found = {}
        for kind in thetas:
            given = dict((new or {}).get(kind) or (scaling if kind == "full_attention" else None) or {})
            given.setdefault("rope_theta", old[kind])
            _check_whole(given.get("partial_rotary_factor"))
            found[kind] = self._one_rope(given, head_dim, positions, False)
        return found

    def _rope_fields(self, theta: float, partial: float | None, usual: Mapping[str, Any]) -> dict[str, Any]:
        """What the file says of its one rotary embedding, theta and partial factor among it."""
        stated, share = self._take("rope_theta", None), self._take("partial_rotary_factor", None)
        old, new = self._take("rope_scaling", None), self._take("rope_parameters", None)
        if old and new and dict(old) != dict(new):
            raise _wrong("rope_scaling", old, "the same as rope_parameters, or only one of the two")
        given = dict(new or old or usual)
        if any(isinstance(value, dict) for value in given.values()):
            raise _wrong("rope_parameters" if new else "rope_scaling", given, "one rotary embedding for all layers")
        given.setdefault("rope_theta", theta if stated is None else stated)
        if given.get("partial_rotary_factor") is None:
            given["partial_rotary_factor"] = partial if share is None else share
        if partial is None:
            _check_whole(given.pop("partial_rotary_factor"))
        return given

    def _one_rope(self, given: dict[str, Any], head_dim: int, positions: int, interleaved: bool) -> RopeConfig:
        field = "rope_parameters"
        names = {given.pop("rope_type", None), given.pop("type", None)} - {None}
        if len(names) > 1:
            raise _wrong(f"{field}.rope_type", sorted(names), "one name")
        kind: Any = names.pop() if names else "default"
        if kind not in _ROPE_KEYS:
            raise _wrong(f"{field}.rope_type", kind, "one of " + ", ".join(_ROPE_KEYS))
        theta, partial = given.pop("rope_theta"), given.pop("partial_rotary_factor", 1.0)
        values: dict[str, Any] = {}
        if kind == "yarn":
            values["truncate"] = bool(given.pop("truncate", True))
        dims = int(head_dim * _above_zero("partial_rotary_factor", partial))
        if kind == "longrope":
            for key in ("short_factor", "long_factor"):
                values[key] = _above_zeros(f"{field}.{key}", given.pop(key, None), dims // 2)
        for key, default in _ROPE_KEYS[kind].items():
            value = given.pop(key, None)
            if value is None:
                value = positions if key == _ORIGINAL else default
            if value is not None:
                values[key] = _above_zero(f"{field}.{key}", value)
        if given:
            raise _wrong(f"{field}.{sorted(given)[0]}", given[sorted(given)[0]], f"no such field with {kind!r}")
        stretch = values.pop("mscale", None), values.pop("mscale_all_dim", None)
        if kind == "yarn" and "attention_factor" not in values:
            values["attention_factor"] = _yarn_factor(values["factor"], *stretch)
        if kind == "longrope":
            stretched = values.pop("factor", positions / values[_ORIGINAL])
            values.setdefault("attention_factor", _longrope_factor(stretched, values[_ORIGINAL]))
        return RopeConfig(
            theta=float(_above_zero("rope_theta", theta)),
            dims=dims,
            kind=kind,
            interleaved=interleaved,
            original_max_position_embeddings=int(values.pop(_ORIGINAL, 0)),
            **values,
        )

    def window(self, name: str = "sliding_window", default: Any = None) -> int | None:
        """A sliding window; None where the field is null."""
        value = self._take(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise _wrong(name, value, "a whole number of at least 1, or null")
        return value

    def qwen_windows(self, layers: int, default_window: int | None, default_first: int) -> tuple[int | None, ...]:
        """Sliding windows per layer, of the four fields that decide them in Qwen's files.

        As transformers does it: nothing slides unless ``use_sliding_window``; without ``layer_types``, layers from
        ``max_window_layers`` on slide.
        """
        enabled = self.boolean("use_sliding_window", False)
        window = self.window(default=default_window)
        first = self._take("max_window_layers", default_first)
        if not enabled:
            window = None
        kinds = self.layer_types(
            layers,
            ("full_attention", _SLIDES),
            lambda layer: _SLIDES if window is not None and layer >= first else "full_attention",
        )
        return self.windows(kinds, window)

    def windows(self, kinds: Sequence[str], window: int | None) -> tuple[int | None, ...]:
        """The window of each layer, of the kinds that :meth:`layer_types` gave: None where it does not slide."""
        if _SLIDES in kinds and window is None:
            raise _wrong("layer_types", _SLIDES, "full_attention, where no sliding window is in use")
        return tuple(window if kind == _SLIDES else None for kind in kinds)

    def skip(self, *names: str) -> None:
        """Fields that this family's mathematics does not read."""
        self._used.update(names)

    def finish(self) -> None:
        """ModelError for a field that was neither read nor is known to change nothing."""
        for name in sorted(set(self._content) - self._used - HARMLESS):
            value = self._content[name]
            if name not in INERT:
                raise ModelError(
                    "config.json has a field that this decoder does not know",
                    where=name,
                    got=value,
                    expected="only fields of the architecture",
                    fix="remove the field if the model does not depend on it, else the model cannot be trained here",
                )
            if value not in INERT[name]:
                raise _wrong(name, value, "one of " + ", ".join(repr(item) for item in INERT[name]))

    def _take(self, name: str, default: Any) -> Any:
        self._used.add(name)
        if name in self._content:
            return self._content[name]
        if default is REQUIRED:
            raise ModelError("config.json lacks a field", where=name, fix="fetch the folder again")
        return default


def _wrong(name: str, got: Any, expected: str) -> ModelError:
    return ModelError(
        "config.json asks for something that this decoder does not do",
        where=name,
        got=repr(got),
        expected=expected,
        fix="use a model without it; it is not ignored, because the model would be another one",
    )


def _check_whole(partial: Any) -> None:
    if partial not in (None, 1):
        raise _wrong("partial_rotary_factor", partial, "1: heads of this architecture turn whole")


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise _wrong(name, None if value is REQUIRED else value, "a number above 0")
    return value


def _above_zeros(name: str, value: Any, count: int) -> tuple[float, ...]:
    """A list of this many numbers, as a tuple."""
    if not isinstance(value, list) or len(value) != count:
        raise _wrong(name, value, f"{count} numbers above 0, one for each pair that turns")
    return tuple(float(_above_zero(f"{name}[{number}]", item)) for number, item in enumerate(value))


def _longrope_factor(factor: float, original: float) -> float:
    """``sqrt(1 + ln(factor) / ln(original))`` (Ding et al. 2024); 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def yarn_stretch(factor: float, scale: float = 1.0) -> float:
    """``0.1 * scale * ln(factor) + 1`` (Peng et al. 2023, equation 22); 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn_factor(factor: float, mscale: float | None, all_dim: float | None) -> float:
    """As transformers: the ratio of two stretches where both are stated (DeepSeek), else that of the factor."""
    if mscale and all_dim:
        return yarn_stretch(factor, mscale) / yarn_stretch(factor, all_dim)
    return yarn_stretch(factor)


def check_heads(heads: int, key_value_heads: int, head_dim: int) -> None:
    """ModelError where the head counts cannot be combined."""
    if heads % key_value_heads:
        raise _wrong("num_key_value_heads", key_value_heads, f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2:
        raise _wrong("head_dim", head_dim, "an even number: the rotary embedding turns pairs")
