"""What a reproduction begins with: the recorded inputs, each looked at, in their places of the recorded run file."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.graph import HERE
from posttrain_lib.schema.manifests import ArtifactRef
from steps.recorded import Recorded, lineage_of, look

_COMPANIONS = (("dpo", "reference"), ("distill", "teacher"), ("grpo", "reference"), ("grpo", "teacher"))
#: beginning of the names of what evaluation tasks read
_OF_TASKS = ("task:", "judge:")


def parse_moved(text: str, recorded: Recorded) -> dict[str, str]:
    """``name=path,name=path`` as a mapping.

    Raises:
        ConfigError: not of that form, or the run had no such input.
    """
    moved = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, sign, path = part.partition("=")
        if not sign or not path or name not in recorded.inputs:
            raise ConfigError(
                "this gives no input of the run",
                where="--input",
                got=part,
                expected=f"NAME=PATH with NAME one of: {', '.join(recorded.inputs) or 'none, all was generated'}",
            )
        moved[name] = path
    return moved


def check_inputs(recorded: Recorded, moved: Mapping[str, str]) -> None:
    """Every input is there with the content that it had. A large file is read once, then remembered.

    Raises:
        ConfigError: naming each that is gone or was changed, and what can still be done.
    """
    found = {}
    for name, ref in recorded.inputs.items():
        state = look(dataclasses.replace(ref, uri=moved.get(name, ref.uri))).state
        if state != HERE and name in moved:
            raise ConfigError(
                "this is not the input that the run had",
                where=f"--input {name}={moved[name]}",
                got=state,
                expected=f"content of digest {ref.digest}; of rows, the names of their files belong to it",
            )
        if state != HERE:
            found[name] = state
    if found:
        names = ", ".join(f"{name}=PATH" for name in found)
        raise ConfigError(
            "the run cannot be reproduced without its inputs",
            where=recorded.name,
            got="\n            ".join(
                f"{name}: {recorded.inputs[name].uri}: {state}; it was digest {recorded.inputs[name].digest}"
                for name, state in found.items()
            ),
            fix="\n            ".join(
                [
                    f"put that content back, or say where it lies now: --input {names}",
                    *_made_by_runs(recorded, found),
                    _still_there(recorded),
                ]
            ),
        )


def with_inputs(recorded: Recorded, moved: Mapping[str, str]) -> dict[str, Any]:
    """The recorded run file with each input by its recorded place, or where it lies now; without what would let the
    reproduction go on from the run's own checkpoints, or report to its trackers."""
    config = copy.deepcopy(recorded.config)
    for name, ref in recorded.inputs.items():
        for section, field in _places(config, name, recorded.inputs):
            if name in moved and "origin" in section:
                section["origin"] = None  # it says the old place
            section[field] = moved.get(name, ref.uri)
        if name in moved and name.startswith(_OF_TASKS):
            config["evaluation"] = _replaced(config["evaluation"], ref.uri, moved[name])
    for train in _trainings(config):
        train["checkpoint"]["folder"] = None
    if "tracking" in config:
        config["tracking"] = []
    return config


def _places(
    config: dict[str, Any], name: str, inputs: Mapping[str, ArtifactRef]
) -> Iterator[tuple[dict[str, Any], str]]:
    """(section, field) of every place of the run file that names an input."""
    step, _, own = name.rpartition(".") if name.startswith("warm_start.") else ("", "", name)
    kind, _, source = own.partition(":")
    warm = (config.get("grpo") or {}).get("warm_start") or {"data": {"sources": []}}
    if kind == "source":
        listed = [] if step else list(config["data"]["sources"])
        if step or f"warm_start.{own}" not in inputs:
            listed += warm["data"]["sources"]
        yield from ((each, "path") for each in listed if each["name"] == source and each["path"] is not None)
    if kind == "grader":
        title, _, option = source.rpartition(":")
        terms = config["grpo"]["rewards"]
        yield from (
            (term["options"], option) for term in terms if (term["title"] or term["name"].rpartition(":")[2]) == title
        )
    wanted = {
        "model": [(config["model"], "path")],
        "companion": [((config.get(recipe) or {}).get(part) or {}, "path") for recipe, part in _COMPANIONS],
        "tokenizer": [(config.get("data") or {}, "tokenizer")],
        "chat_template": [(config.get("data") or {}, "chat_template")],
        "warm_start:tokenizer": [(warm["data"], "tokenizer")],
        "warm_start:chat_template": [(warm["data"], "chat_template")],
        "scratch_tokenizer": [(config["model"].get("from_scratch") or {}, "tokenizer")],
    }
    yield from ((section, field) for section, field in wanted.get(name, ()) if section.get(field) is not None)


def _trainings(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    warm = (config.get("grpo") or {}).get("warm_start")
    yield from (section["train"] for section in (config, warm) if section is not None and "train" in section)


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _replaced(item, old, new) for name, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return new if value == old else value


def _made_by_runs(recorded: Recorded, names: Mapping[str, str]) -> Iterator[str]:
    """How to have a model again that another run exported."""
    for name in names:
        for section, _ in _places(recorded.config, name, recorded.inputs):
            origin = section.get("origin") or {}
            if origin.get("flow") is not None:
                run = f"{origin['flow']}/{origin['run']}"
                yield f"{name} was the export of {run}: flows/reproduce_flow.py run --keep true --origin {run} makes it"


def _still_there(recorded: Recorded) -> str:
    nodes = lineage_of(recorded.manifests).nodes.values()
    whole = [node.manifest.step for node in nodes if node.manifest is not None and node.state == HERE]
    held = ", ".join(step for step in recorded.manifests if step in whole)
    return f"results of the run that are still in the store, whole: {held or 'none'}"
