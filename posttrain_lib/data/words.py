"""The strings inside a nested value, keys included: all that a row says in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain_lib.data.refusal import RefusedRow

#: deeper than any schema or call; templates and JSON writers recurse, and Python stops them at about a thousand
DEEPEST = 100


def strings(value: Any) -> Iterator[str]:
    """Every string in it, in no particular order.

    Raises:
        RefusedRow: it is nested more than :data:`DEEPEST` levels deep.
    """
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            yield item
            continue
        if depth > DEEPEST:
            raise RefusedRow("nested_too_deep", f"a field of the row is nested more than {DEEPEST} levels deep")
        if isinstance(item, Mapping):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            waiting += [(part, depth + 1) for part in item]


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy in which every string is what ``change`` makes of it.

    Keys too, but for identifiers: by those templates look values up, and no control token is one.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_key(key, change): with_strings(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [with_strings(part, change) for part in value]
    return value


def _key(key: Any, change: Callable[[str], str]) -> Any:
    return change(key) if isinstance(key, str) and not key.isidentifier() else key
