"""Which project source a module depends on, and its digest.

The walk is static: imports anywhere in a file (functions included), and string constants of the form
``package.module:attribute``, because the registries name what they load that way. A change in an unrelated file
leaves the digest alone; a change in anything reachable does not.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from posttrain_lib.lineage.digests import digest_file, digest_value

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("posttrain_lib", "steps")
_USER_REFERENCE = re.compile(r"^[A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_][\w.]*$")
_REFERENCE = re.compile(r"^((?:posttrain_lib|steps)(?:\.\w+)+)(?::\w+)?$")


def module_file(name: str, root: Path = PROJECT_ROOT) -> Path | None:
    """The file of a project module or package, None for anything else."""
    if name.split(".")[0] not in PACKAGES:
        return None
    base = root.joinpath(*name.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _names_in(path: Path, _stamp: int) -> frozenset[str]:
    """Dotted names that a file refers to, project modules or not."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # A module's own command line is not part of what it computes, and would pull in every other step.
    tree.body = [node for node in tree.body if not _is_main_guard(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            reference = _REFERENCE.match(node.value)
            if reference:
                names.add(reference.group(1))
    return frozenset(names)


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def project_sources(module: str, root: Path = PROJECT_ROOT) -> list[Path]:
    """Files reachable from ``module`` by imports, ``__init__`` files of their packages included, sorted."""
    pending, seen, files = [module], set(), set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        parent = name.rpartition(".")[0]
        if parent:
            pending.append(parent)
        path = module_file(name, root)
        if path is None:
            continue
        files.add(path)
        pending.extend(_names_in(path, path.stat().st_mtime_ns))
    return sorted(files)


def source_digests(module: str, root: Path = PROJECT_ROOT) -> dict[str, str]:
    """File name relative to the project -> sha256, for everything ``module`` reaches."""
    return {path.relative_to(root).as_posix(): digest_file(path) for path in project_sources(module, root)}


def user_code(references: Iterable[str]) -> dict[str, str]:
    """``module:attribute`` -> digest of the module's file, for code that is neither the project's nor installed.

    Installed packages are in the environment's digest. What such a module imports in turn is not followed, save the
    other files of its own package, be it a folder without ``__init__.py``.
    """
    found = {}
    for reference in references:
        top = reference.partition(":")[0].partition(".")[0]
        if top in PACKAGES or top in sys.stdlib_module_names:
            continue
        if files := _files_of(top):
            found[reference] = digest_value([digest_file(file) for file in files])
    return found


def _files_of(top: str) -> list[Path]:
    """A module's file, or all of a package's; none of what is installed, or is not there."""
    spec = importlib.util.find_spec(top)
    if spec is None:
        return []
    if spec.origin is not None and Path(spec.origin).name != "__init__.py":
        files = [Path(spec.origin)]
    else:
        files = [file for place in spec.submodule_search_locations or () for file in sorted(Path(place).rglob("*.py"))]
    return [file for file in files if not any(part.endswith("-packages") for part in file.parts)]


def references_in(value: Any) -> Iterator[str]:
    """Every string of the form ``module:attribute`` in plain config values."""
    if isinstance(value, str) and _USER_REFERENCE.match(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from references_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references_in(item)


def source_digest(module: str, root: Path = PROJECT_ROOT) -> str:
    """One digest over :func:`source_digests`."""
    return digest_value(source_digests(module, root))
