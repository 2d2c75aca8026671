"""From YAML to the config model of a recipe, with errors that name the place and the nearest right key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from posttrain_lib.config.base import Disagreement
from posttrain_lib.config.run import RunConfig
from posttrain_lib.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
#: keys may go through names of sources, tasks and metrics
_NEXT_OVERRIDE = re.compile(r",(?=\s*[A-Za-z_][\w.@-]*=)")


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key stands once: plain YAML lets the last of two win, without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As SafeLoader's, then a look for doubles: before a merge (``<<``) puts other mappings' keys beside them."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no key of a mapping: SafeLoader refuses it
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return node


class _StrictDumper(yaml.SafeDumper):
    """Writes what :class:`_StrictLoader` reads as it was."""


for _side in (_StrictLoader, _StrictDumper):  # 1e-5 is a number in YAML 1.2, and for whoever writes it; PyYAML has 1.1
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _split_overrides(text: str) -> list[str]:
    """``a.b=1,c.d=[2,3]`` as its parts: a comma separates where a key and an equals sign follow, behind a whole value.
    Within quotes and brackets there is none."""
    pieces: list[str] = []
    for piece in _NEXT_OVERRIDE.split(text):
        if pieces and not _is_yaml(pieces[-1].partition("=")[2]):
            pieces[-1] += f",{piece}"
        else:
            pieces.append(piece)
    return [piece for piece in pieces if piece.strip()]


def _is_yaml(text: str) -> bool:
    try:
        yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError):
        return False
    return True


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, expand ``${VARIABLE}``, apply ``section.key=value`` overrides, validate.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or holds an unknown key or impossible value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the config file cannot be read", where=path, got=error, fix="name an existing YAML file in UTF-8"
        ) from error
    return parse_run_config(text, where=str(path), overrides=overrides)


def parse_run_config(text: str, *, where: str = "config", overrides: Sequence[str] = ()) -> RunConfig:
    """Like :func:`load_run_config`, from the YAML text itself."""
    return parse_config(RunConfig, text, where=where, overrides=overrides)


def build_run_config(raw: dict[str, Any], *, where: str = "config", overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a plain mapping, after overrides and variable expansion."""
    return build_config(RunConfig, raw, where=where, overrides=overrides)


def parse_config(model: type[Config], text: str, *, where: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe's config from YAML text.

    Raises:
        ConfigError: no YAML mapping, an unknown key (of ``model``: the nearest right one is named), an impossible
            value, a variable that is not set.
    """
    return build_config(model, load_yaml(text, where), where=where, overrides=overrides)


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping of a config's text, nothing of it validated.

    Raises:
        ConfigError: no YAML, or no mapping.
    """
    try:
        raw = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # a date that no calendar has is a ValueError
        mark = getattr(error, "problem_mark", None)
        line = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ConfigError(
            "the config is not valid YAML", where=line, got=getattr(error, "problem", error), fix="mend that line"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError("the config is not a mapping of sections", where=where, got=type(raw).__name__)
    return raw


def dump_yaml(plain: dict[str, Any]) -> str:
    """Plain values as text that :func:`load_yaml` reads to the same."""
    return yaml.dump(plain, Dumper=_StrictDumper, sort_keys=False)


def build_config(model: type[Config], raw: dict[str, Any], *, where: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe's config from a plain mapping, after overrides and variable expansion; raises as above."""
    pieces = [piece for text in overrides for piece in _split_overrides(text)]
    for override in pieces:
        raw = _override(raw, override)
    raw = expand_variables(raw, where, ())
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, where, model, pieces) from error


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("an override is not of the form section.key=value", got=override, expected="train.steps=100")
    path = _names(raw, key.strip())
    result = dict(raw)
    node: Any = result
    for name in path[:-1]:
        child = node.get(name)
        if child is not None and not isinstance(child, dict):
            raise ConfigError("an override goes through a value that is no section", where=key, got=child)
        node[name] = dict(child or {})
        node = node[name]
    try:
        node[path[-1]] = yaml.load(value, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # a date that no calendar has is a ValueError
        raise ConfigError(
            "the value of an override is not valid YAML", where=key, got=value, fix="quote it: key='\"text\"'"
        ) from error
    return result


def _names(raw: dict[str, Any], key: str) -> list[str]:
    """The key's parts; of several that together are one key of the file, as ``held_out.loss`` among gates, that one."""
    names: list[str] = []
    parts, node = key.split("."), cast(Any, raw)
    while parts:
        several = range(len(parts), 1, -1) if isinstance(node, dict) else ()
        taken = next((count for count in several if ".".join(parts[:count]) in node), 1)
        names.append(".".join(parts[:taken]))
        node = node.get(names[-1]) if isinstance(node, dict) else None
        parts = parts[taken:]
    return names


def expand_variables(value: Any, where: str, place: tuple[str, ...]) -> Any:
    """Plain values, in which ``${VARIABLE}`` stands for the environment's; ``place``: the keys that lead to them.

    Raises:
        ConfigError: a variable is not set.
    """
    if isinstance(value, dict):
        return {key: expand_variables(item, where, (*place, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_variables(item, where, (*place, str(i))) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match[str]) -> str:
        found = os.environ.get(match.group(1))
        if found is None:
            raise ConfigError(
                f"the environment variable {match.group(1)} is not set",
                where=f"{where}: {'.'.join(place)}",
                got=value,
                fix=f"export {match.group(1)}=... before the run",
            )
        return found

    return _VARIABLE.sub(substitute, value)


def _explain(error: ValidationError, where: str, model: type[BaseModel], overrides: Sequence[str]) -> ConfigError:
    """The first problem in full, the places of the others beside it; unknown keys come first."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"])
    if concerned := [override for override in overrides if _concerns(override, place)]:
        where = f"{where}, with {' and '.join(concerned)}"
    more = [".".join(str(part) for part in problem["loc"]) for problem in problems[1:]]
    others = f" (also wrong: {', '.join(dict.fromkeys(more))})" if more else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_keys_at(model, first["loc"][:-1]))
        wrong = str(first["loc"][-1])
        nearest = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
        fix = f"did you mean '{nearest[0]}'?" if nearest else "remove it"
        return ConfigError(
            f"unknown key '{place}'{others}", where=where, got=wrong, expected="one of: " + ", ".join(known), fix=fix
        )
    got = None if first["type"] == "missing" or isinstance(first["input"], dict | BaseModel) else repr(first["input"])
    message = first["msg"].removeprefix("Value error, ")
    subject = f"config field '{place}'" if place else "the config's sections do not agree"
    cause = first.get("ctx", {}).get("error")
    mend = cause.fix if isinstance(cause, Disagreement) else None
    return ConfigError(f"{subject}: {message}{others}", where=where, got=got, fix=mend)


def _concerns(override: str, place: str) -> bool:
    """Whether the override sets what is at the place, something in it, or what it is in; ``place`` is empty for all."""
    key = override.partition("=")[0].strip()
    return not place or f"{place}.".startswith(f"{key}.") or f"{key}.".startswith(f"{place}.")


def _keys_at(kind: Any, place: Sequence[int | str]) -> set[str]:
    """Field names of the section at ``place``, where a value of the type ``kind`` starts.

    A place is pydantic's: besides fields it has the numbers and keys of collections, and before what is wrong with one
    member of a union the member's tag.
    """
    inner = get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not place:
            return set(kind.model_fields)
        return _keys_at(kind.model_fields[str(place[0])].annotation, place[1:])
    if get_origin(kind) in (Union, UnionType):
        tagged = [member for member in inner if place and place[0] in _tags(member)]
        return set().union(*(_keys_at(member, place[1:] if tagged else place) for member in tagged or inner))
    if get_origin(kind) is Annotated:
        return _keys_at(inner[0], place)
    if get_origin(kind) in (tuple, list, dict) and place:
        return _keys_at(inner[1 if get_origin(kind) is dict else 0], place[1:])
    return set()


def _tags(member: Any) -> set[Any]:
    """What stands for a member of a union: its tag, or the fields of it that have one value only."""
    tags = {note.tag for note in getattr(member, "__metadata__", ()) if isinstance(note, Tag)}
    kinds = (field.annotation for field in getattr(member, "model_fields", {}).values())
    return tags | {get_args(kind)[0] for kind in kinds if get_origin(kind) is Literal and len(get_args(kind)) == 1}
