"""Laying out generated source as a formatter would: on one line, else the arguments on one, else one a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 120
_INDENT = 4


@dataclass(frozen=True)
class Call:
    """``name(arguments)``; a tuple where the name is empty. Arguments may have ``keyword=`` before them."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True)
class Keyword:
    """``name=value`` among arguments."""

    name: str
    value: Node


Node = str | Call | Keyword


def flat(node: Node) -> str:
    """On one line."""
    if isinstance(node, str):
        return node
    if isinstance(node, Keyword):
        return f"{node.name}={flat(node.value)}"
    inner = ", ".join(map(flat, node.arguments))
    return f"{node.name}({inner}{',' if not node.name and len(node.arguments) == 1 else ''})"


def lay_out(node: Node, indent: int = 0, before: str = "", after: str = "") -> list[str]:
    """Lines of a node, with text before and behind it."""
    if isinstance(node, Keyword):
        return lay_out(node.value, indent, f"{before}{node.name}=", after)
    space, line = " " * indent, f"{before}{flat(node)}{after}"
    if isinstance(node, str) or indent + len(line) <= WIDTH or not node.arguments:
        return [space + line]
    inner = ", ".join(map(flat, node.arguments))
    if indent + _INDENT + len(inner) <= WIDTH and (node.name or len(node.arguments) > 1):
        body = [" " * (indent + _INDENT) + inner]
    else:
        body = [part for item in node.arguments for part in lay_out(item, indent + _INDENT, after=",")]
    return [f"{space}{before}{node.name}(", *body, f"{space}){after}"]


def imported(module: str, names: Sequence[str]) -> list[str]:
    """A ``from`` import, names in isort's order."""
    ordered = sorted(set(names), key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= WIDTH:
        return [line]
    return [f"from {module} import (", *(f"    {name}," for name in ordered), ")"]
