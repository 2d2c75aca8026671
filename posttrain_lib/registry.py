"""From a name in a run file to the thing it names: a key of an explicit table, or ``module:attribute``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from posttrain_lib.errors import ConfigError


def resolve(name: str, table: Mapping[str, str], *, what: str, where: str) -> Any:
    """The attribute that ``name`` stands for.

    Args:
        name: a key of ``table``, or ``module:attribute`` of anything importable.
        table: name -> ``module:attribute``.
        what: the kind of thing, for messages. where: the config field.

    Raises:
        ConfigError: an unknown name, or one that cannot be imported.
    """
    module, colon, attribute = table.get(name, name).partition(":")
    if not colon:
        near = difflib.get_close_matches(name, table, n=1)
        raise ConfigError(
            f"unknown {what}",
            where=where,
            got=name,
            expected=f"one of {', '.join(sorted(table))}; or module:attribute",
            fix=f"did you mean '{near[0]}'?" if near else None,
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"the {what} cannot be imported",
            where=where,
            got=name,
            expected="module:attribute of an installed library",
            fix=str(error),
        ) from error
    return found
