"""Row formats by name. A new one is one file with ``FIELDS``, ``NEEDED`` and ``parse``, and a line here.

``FIELDS`` are the names under which the format looks for its values, ``NEEDED`` those without which no row can be used;
a source's ``fields`` say what its rows call them. ``ALSO`` has further names of fields, where the format knows others
than those of ``common``. A name that ``fields`` gives to one field is no longer looked at for
the field that it is the own name of.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

from posttrain_lib.data.formats.common import ALSO
from posttrain_lib.errors import ConfigError
from posttrain_lib.schema.examples import ParsedRow

FORMATS: dict[str, str] = {
    "alpaca": "posttrain_lib.data.formats.alpaca:parse",
    "calculations": "posttrain_lib.rl.environments.calculations:parse",
    "messages": "posttrain_lib.data.formats.messages:parse",
    "preference": "posttrain_lib.data.formats.preference:parse",
    "prompt_completion": "posttrain_lib.data.formats.prompt_completion:parse",
    "prompts": "posttrain_lib.data.formats.prompts:parse",
    "sharegpt": "posttrain_lib.data.formats.sharegpt:parse",
    "text": "posttrain_lib.data.formats.text:parse",
    "tokens": "posttrain_lib.data.formats.tokens:parse",
}

#: (row, source name, row id, name of the group field, {format's name: row's name}) -> row; raises RefusedRow
Parse = Callable[[Mapping[str, Any], str, str, "str | None", Mapping[str, str]], ParsedRow]


def get_format(name: str) -> Parse:
    """The parser of a row format.

    Raises:
        ConfigError: no such format.
    """
    parse: Parse = _module(name).parse
    return parse


def check_fields(format_name: str, fields: Mapping[str, str]) -> None:
    """Refuse names that the format does not look for, before the first row is read.

    Raises:
        ConfigError: no such format, a name that is none of its fields, two fields read from one name, or one that
            every row needs with its name given to another.
    """
    module = _module(format_name)
    own = module.FIELDS
    for name in fields:
        if name not in own:
            near = difflib.get_close_matches(name, own, n=1)
            raise ConfigError(
                f"format {format_name!r} has no field {name!r}",
                where="data.sources.fields",
                got=dict(fields),
                expected=f"of {', '.join(own)}: what the rows call it",
                fix=f"is {near[0]!r} meant?" if near else None,
            )
    called = list(fields.values())
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise ConfigError(
            f"two fields of format {format_name!r} are read from one",
            where="data.sources.fields",
            got=dict(fields),
            expected=f"each from a field of its own, not {', '.join(twice)} for both",
        )
    if lost := [name for name in module.NEEDED if name in called and name not in fields]:
        raise ConfigError(
            f"format {format_name!r} needs {', '.join(lost)}, and that name is given to another field",
            where="data.sources.fields",
            got=dict(fields),
            expected=f"also what the rows call {', '.join(lost)}",
        )


def fields_of(format_name: str, fields: Mapping[str, str]) -> list[tuple[str, set[str]]]:
    """(field, names under which it is looked for) of every field that no row of the format can do without."""
    module = _module(format_name)
    return [(name, {fields[name]} if name in fields else _known_names(module, name)) for name in module.NEEDED]


def formats_like(names: Collection[str]) -> list[str]:
    """The formats that rows with fields of these names may be of: all that is needed is there, and most of the rest."""
    scores: dict[str, int] = {}
    for format_name in FORMATS:
        module = _module(format_name)
        known = {name for name in module.FIELDS if _known_names(module, name).intersection(names)}
        if known.issuperset(module.NEEDED):
            scores[format_name] = len(known)
    return [name for name, score in scores.items() if score == max(scores.values())]


def _known_names(module: ModuleType, field: str) -> set[str]:
    return {field, *getattr(module, "ALSO", ALSO).get(field, ())}


def _module(name: str) -> ModuleType:
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        raise ConfigError(
            "unknown row format",
            where="data.sources.format",
            got=name,
            expected=f"one of {sorted(FORMATS)}",
            fix=f"is {near[0]!r} meant?" if near else None,
        )
    return importlib.import_module(FORMATS[name].partition(":")[0])
