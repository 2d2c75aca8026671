"""Row formats by name. A new one is one file with a ``parse`` function and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from posttrain_lib.errors import ConfigError
from posttrain_lib.schema.examples import Conversation

FORMATS: dict[str, str] = {
    "messages": "posttrain_lib.data.formats.messages:parse",
}

#: (row, source name, row id, name of the group field) -> Conversation; raises RefusedRow
Parse = Callable[[Mapping[str, Any], str, str, "str | None"], Conversation]


def get_format(name: str) -> Parse:
    """The parser of a row format.

    Raises:
        ConfigError: no such format.
    """
    if name not in FORMATS:
        raise ConfigError(
            "unknown row format", where="data.sources.format", got=name, expected=f"one of {sorted(FORMATS)}"
        )
    module, _, attribute = FORMATS[name].partition(":")
    parse: Parse = getattr(importlib.import_module(module), attribute)
    return parse
