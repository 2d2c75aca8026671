"""What an agent is told about a model folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain_lib.models.weights import Shape

#: fields of a config.json that name the family, its classes or where it came from
NAMING = frozenset(
    """
    model_type architectures auto_map _name_or_path name_or_path tokenizer_class transformers_version base_model_tp_plan
    base_model_pp_plan finetuning_task
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class FieldEffect:
    """What changing a field does to transformers' model: see ``reference_facts``."""

    change: str
    result: str
    parameters: tuple[str, ...] = ()
    said: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        plain = {"change": self.change, "result": self.result, "parameters": list(self.parameters)}
        return {**plain, "said": self.said} if self.said else plain


@dataclass(frozen=True)
class Brief:
    """A model folder as an agent sees it.

    ``config`` is config.json without what names the family; ``defaults`` are transformers' values of missing fields;
    ``tensors``: name -> shape of what is stored; ``effects`` by field. ``names`` (model_type, class) is None for an
    agent that must find out by itself.
    """

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    tensors: Mapping[str, Shape]
    effects: Mapping[str, FieldEffect]
    names: tuple[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; tensors of all layers and experts as one line each."""
        return {
            "config": dict(self.config),
            "defaults": dict(self.defaults),
            "tensors": folded(self.tensors),
            "effects": {name: effect.to_dict() for name, effect in self.effects.items()},
            **({} if self.names is None else {"model_type": self.names[0], "class": self.names[1]}),
        }


@dataclass(frozen=True)
class Scrubber:
    """Takes the family's names, and the folder's, out of everything that an agent gets to see."""

    words: tuple[str, ...]
    pattern: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        longest_first = sorted({word for word in self.words if len(word) > 2}, key=len, reverse=True)
        object.__setattr__(
            self, "pattern", re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)
        )

    @classmethod
    def of(cls, hf_config: Mapping[str, Any], places: Iterable[str] = ()) -> Scrubber:
        """Of a config.json: its names, the classes that transformers forms of them, and ``places``."""
        names = [str(hf_config.get("model_type", "")), *map(str, hf_config.get("architectures") or ())]
        stems = [re.sub(r"For[A-Z]\w*$|Model$", "", name) for name in names]
        plain = [stem.replace("_", "").replace("-", "") for stem in stems]
        return cls((*names, *stems, *plain, *places))

    def text(self, text: str) -> str:
        """The text with a dash in place of every name."""
        return self.pattern.sub("-", text)

    def value(self, value: Any) -> Any:
        """The same for plain data; keys are left as they are, for they are how fields are read."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def config(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json without the naming fields, every other value scrubbed."""
        return {key: self.value(item) for key, item in hf_config.items() if key not in NAMING}


def make_brief(
    hf_config: Mapping[str, Any],
    tensors: Mapping[str, Shape],
    facts: Mapping[str, Any],
    *,
    named: bool,
    places: Iterable[str] = (),
) -> Brief:
    """The brief of a folder.

    Args:
        tensors: stored name -> shape.
        facts: what ``reference_facts`` found.
        named: say the family's names.
        places: words to keep from an agent that is not told them, beside the names.
    """
    scrubber = Scrubber.of(hf_config, places)
    names = (str(hf_config.get("model_type")), str((hf_config.get("architectures") or [""])[0]))
    return Brief(
        config=scrubber.config(hf_config),
        defaults=scrubber.config(facts["defaults"]),
        tensors=dict(tensors),
        effects={
            name: FieldEffect(
                effect["change"], effect["result"], tuple(effect["parameters"]), scrubber.text(effect["said"])
            )
            for name, effect in facts["effects"].items()
            if name not in NAMING
        },
        names=names if named else None,
    )


def folded(tensors: Mapping[str, Shape]) -> dict[str, dict[str, Any]]:
    """Name with ``{n}`` for the layer and ``{e}`` for the expert -> its shape, and in which layers it is."""
    found: dict[str, dict[str, Any]] = {}
    for name, shape in tensors.items():
        pattern, layer = layer_and_pattern(name)
        entry = found.setdefault(pattern, {"shape": list(shape), "layers": []})
        if layer is not None and layer not in entry["layers"]:
            entry["layers"].append(layer)
    return {name: entry if entry["layers"] else {"shape": entry["shape"]} for name, entry in found.items()}


_NUMBER, _EXPERT = re.compile(r"\.(\d+)\."), re.compile(r"(expert\w*)\.\d+\.")


def layer_and_pattern(name: str) -> tuple[str, int | None]:
    """``model.layers.3.mlp.experts.5.w1.weight`` -> (``model.layers.{n}.mlp.experts.{e}.w1.weight``, 3)."""
    found = _NUMBER.search(name)
    if found is None:
        return name, None
    rest = _EXPERT.sub(r"\1.{e}.", name[found.end() :])
    return f"{name[: found.start()]}.{{n}}.{rest}", int(found.group(1))


def report_for_agent(report: Mapping[str, Any], scrubber: Scrubber) -> dict[str, Any]:
    """The part of a gate's report that an agent gets: figures and modules; no folder, no family."""
    kept = {name: report[name] for name in ("passed", "checks", "first_wrong_module", "detail", "modules")}
    scrubbed: dict[str, Any] = scrubber.value(json.loads(json.dumps(kept)))
    return scrubbed
