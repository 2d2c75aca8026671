"""The text of a proposed family file: what it may say, and the names that it gets in the end.

A family file only declares: it reads fields and builds dataclasses. So what could reach around the sandbox is refused
before anything runs, and a reviewer has that much less to look for. The sandbox and the separate judge are what the
verdict rests on; this is not.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from dataclasses import dataclass

#: what a proposal calls the family; the real names are put in their place when it has passed
MODEL_TYPE, ARCHITECTURE = "new_family", "NewFamilyForCausalLM"
_FAMILIES = "posttrain_lib.models.families"
_MAY_IMPORT = {
    "__future__",
    "collections.abc",
    "dataclasses",
    "math",
    "typing",
    "posttrain_lib.errors",
    "posttrain_lib.models.spec",
    "posttrain_lib.models.weights",
    _FAMILIES,
    f"{_FAMILIES}.fields",
    f"{_FAMILIES}.shared",
}
_FORBIDDEN_NAMES = frozenset(
    {
        "breakpoint",
        "compile",
        "delattr",
        "eval",
        "exec",
        "getattr",
        "globals",
        "input",
        "locals",
        "open",
        "setattr",
        "vars",
    }
)
_LONGEST = 64 * 1024


@dataclass(frozen=True)
class FamilyFile:
    """The source of one ``posttrain_lib/models/families/*.py``, and what its author says about it."""

    text: str
    note: str = ""


def objections(text: str, families: Collection[str] = ()) -> list[str]:
    """What a family file may not do, each with its line; empty where there is nothing to object to.

    Args:
        families: modules of other families that it may build on, as ``posttrain_lib.models.families.llama``.
    """
    if len(text.encode()) > _LONGEST:
        return [f"the file has {len(text.encode()):,} bytes; a family file has at most {_LONGEST:,}"]
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [f"{type(error).__name__}: {error}"]
    allowed = _MAY_IMPORT | set(families)
    found = []
    for node in ast.walk(tree):
        if (said := _objection(node, allowed)) is not None:
            found.append(f"line {getattr(node, 'lineno', 0)}: {said}")
    if not any(_assigns_family(node) for node in tree.body):
        found.append("there is no FAMILY = Family(...) at the top level")
    return found


def _objection(node: ast.AST, allowed: Collection[str]) -> str | None:
    if isinstance(node, ast.Import):
        return next((f"imports {item.name}" for item in node.names if item.name not in allowed), None)
    if isinstance(node, ast.ImportFrom):
        inside = f"imports from {'.' * node.level}{node.module or ''}"
        if node.level or node.module not in allowed:
            return inside
        if node.module == _FAMILIES and any(item.name != "Family" for item in node.names):
            return f"{inside} something other than Family"
        return None
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        return f"changes an attribute: {ast.unparse(node)}"
    if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
        return f"reaches for a private attribute: {ast.unparse(node)}"
    if isinstance(node, ast.Name) and (node.id in _FORBIDDEN_NAMES or node.id.startswith("__")):
        return f"uses {node.id}"
    if isinstance(node, ast.Global | ast.AsyncFunctionDef | ast.While | ast.With | ast.Try):
        return f"has no use for {type(node).__name__}"
    return None


def _assigns_family(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "FAMILY" for t in node.targets)


def with_names(text: str, model_type: str, architecture: str) -> str:
    """The text under the family's real names."""
    return text.replace(ARCHITECTURE, architecture).replace(MODEL_TYPE, model_type)
