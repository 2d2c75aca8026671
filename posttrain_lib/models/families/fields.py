"""Reading a config.json strictly: every field is used, known to be harmless, or refused by name.

A field that is silently ignored is a model that trains as something else. Refusing costs a user one line in
config.json; ignoring may cost the run. The logit comparison does not see everything (dropout acts in training only).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from posttrain_lib.errors import ModelError
from posttrain_lib.models.spec import RopeConfig

REQUIRED = object()

# Fields that say nothing about the forward or the training of the decoder.
HARMLESS = frozenset(
    """
    architectures model_type transformers_version _name_or_path name_or_path dtype torch_dtype use_cache
    initializer_range pad_token_id bos_token_id eos_token_id return_dict output_attentions output_hidden_states
    max_length min_length do_sample temperature top_k top_p typical_p repetition_penalty num_beams id2label
    label2id problem_type finetuning_task task_specific_params _attn_implementation attn_implementation
    _attn_implementation_autoset chunk_size_feed_forward is_encoder_decoder tokenizer_class prefix
    decoder_start_token_id sep_token_id _commit_hash unsloth_version unsloth_fixed base_model_tp_plan
    base_model_pp_plan
    """.split()  # noqa: SIM905 - a list of forty quoted lines would be harder to read
)
# Fields allowed only where they change nothing: name -> the values that do.
INERT: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "cross_attention_hidden_size": (None,),
    "add_cross_attention": (False, None),
    "is_decoder": (False, True, None),
    "tie_encoder_decoder": (False, None),
    "torchscript": (False, None),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1, 1.0, None),
    "use_mrope": (False, None),
    "auto_map": (None, {}),
    "quantization_config": (None,),
}
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
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

    def optional_integer(self, name: str) -> int | None:
        """A whole number of at least 1; None where the field is missing or null."""
        return None if self._take(name, None) is None else self.integer(name)

    def one_of(self, name: str, allowed: Collection[Any], default: Any = REQUIRED) -> Any:
        """A value of a closed set."""
        value = self._take(name, default)
        if value not in allowed:
            raise _wrong(name, value, "one of " + ", ".join(repr(item) for item in allowed))
        return value

    def rope(self, max_position_embeddings: int) -> RopeConfig:
        """``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before)."""
        theta = self._take("rope_theta", None)
        old, new = self._take("rope_scaling", None), self._take("rope_parameters", None)
        if old and new and dict(old) != dict(new):
            raise _wrong("rope_scaling", old, "the same as rope_parameters, or only one of the two")
        field = "rope_parameters" if new else "rope_scaling"
        given = dict(new or old or {})
        if any(isinstance(value, dict) for value in given.values()):
            raise _wrong(field, given, "one rotary embedding for all layers")
        names = {given.pop("rope_type", None), given.pop("type", None)} - {None}
        if len(names) > 1:
            raise _wrong(f"{field}.rope_type", sorted(names), "one name")
        kind: Any = names.pop() if names else "default"
        if kind not in _ROPE_KEYS:
            raise _wrong(f"{field}.rope_type", kind, "one of " + ", ".join(_ROPE_KEYS))
        theta = given.pop("rope_theta", theta if theta is not None else 10_000.0)
        if given.pop("partial_rotary_factor", 1) not in (1, 1.0, None):
            raise _wrong(f"{field}.partial_rotary_factor", (new or old)["partial_rotary_factor"], "1")
        values: dict[str, float] = {}
        for key in _ROPE_KEYS[kind]:
            value = given.pop(key, max_position_embeddings if key == "original_max_position_embeddings" else None)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise _wrong(f"{field}.{key}", value, "a number above 0")
            values[key] = value
        if given:
            raise _wrong(f"{field}.{sorted(given)[0]}", given[sorted(given)[0]], f"no such field with {kind!r}")
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
            raise _wrong("rope_theta", theta, "a number above 0")
        original = int(values.pop("original_max_position_embeddings", 0))
        return RopeConfig(theta=float(theta), kind=kind, original_max_position_embeddings=original, **values)

    def windows(self, layers: int, default_window: int, default_first: int) -> tuple[int | None, ...]:
        """Sliding windows per layer, of the four fields that decide them.

        As transformers does it: nothing slides unless ``use_sliding_window``; without ``layer_types``, layers from
        ``max_window_layers`` on slide.
        """
        enabled = self.boolean("use_sliding_window", False)
        window = self._take("sliding_window", default_window)
        first = self._take("max_window_layers", default_first)
        kinds = self._take("layer_types", None)
        if not enabled:
            window = None
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise _wrong("sliding_window", window, "a whole number of at least 1, or null")
        if kinds is None:
            slides = [window is not None and layer >= first for layer in range(layers)]
        else:
            if len(kinds) != layers:
                raise _wrong("layer_types", f"{len(kinds)} entries", f"{layers}, one per layer")
            unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
            if unknown:
                raise _wrong("layer_types", unknown[0], "full_attention or sliding_attention")
            slides = [kind == "sliding_attention" for kind in kinds]
            if any(slides) and window is None:
                raise _wrong("layer_types", "sliding_attention", "full_attention, where no sliding window is in use")
        return tuple(window if slide else None for slide in slides)

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


def check_heads(hidden_size: int, heads: int, key_value_heads: int, head_dim: int) -> None:
    """ModelError where the head counts cannot be combined."""
    if heads % key_value_heads:
        raise _wrong("num_key_value_heads", key_value_heads, f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2:
        raise _wrong("head_dim", head_dim, "an even number: the rotary embedding turns pairs")
