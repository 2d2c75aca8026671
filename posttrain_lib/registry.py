"""From a name in a run file to the thing it names: a key of an explicit table, or ``module:attribute``."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Collection, Mapping
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


def check_options(
    named: Any, options: Mapping[str, Any], *, what: str, where: str, leading: int = 0, given: Collection[str] = ()
) -> None:
    """Whether what :func:`resolve` found takes these options; it is not called.

    Args:
        options: its keyword arguments. what: the kind of thing, for messages. where: the config field.
        leading: positional arguments that come before them. given: keyword arguments that are there without them.

    Raises:
        ConfigError: nothing that can be called, or options that it does not take; names the nearest that it has.
    """
    if not callable(named):
        raise ConfigError(
            f"the {what} is nothing that can be called",
            where=where,
            got=f"{named!r}, a {type(named).__name__}",
            expected="a function or a class",
        )
    signature = inspect.signature(named)
    try:
        signature.bind(*[None] * leading, **{**dict.fromkeys(given), **options})
    except TypeError as error:
        known = [name for name in list(signature.parameters)[leading:] if name not in given]
        strange = [name for name in options if name not in known]
        near = [close for name in strange for close in difflib.get_close_matches(name, known, n=1)]
        raise ConfigError(
            f"the {what} does not take these options",
            where=where,
            got=dict(options),
            expected=", ".join(known) or "none",
            fix=f"did you mean '{near[0]}'?" if near else str(error),
        ) from error
