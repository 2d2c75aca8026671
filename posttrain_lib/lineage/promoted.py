"""Promoted models: names that people gave to results, kept in the store.

<root>/models/<name>/<version>.json   one version: which folder, its digest and sizes, which run made it, who promoted
                                      it, when and why. Versions count up from 1; none is changed or removed
<root>/models/<name>/pointer.json     which of them is the current one, and every decision about it (pointer.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ConfigError, StoreError
from posttrain_lib.lineage import pointer
from posttrain_lib.lineage.digests import list_files, sync_folder, write_atomically
from posttrain_lib.lineage.store import Store, disk_errors

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Promoted:
    """One version of a promoted model.

    Attributes:
        files: file below ``path`` -> size in bytes.
        flow, run, step, key, tags: what made it; None and empty of a folder that no run made.
        checks: what the export proved, as plain :class:`~posttrain_lib.schema.manifests.Check`.
        gates: {name, value, limit, sense, holds} of each gate that the run stated.
        forced: why it was promoted all the same, where checks or gates failed or its run did.
    """

    name: str
    version: int
    path: str
    digest: str
    files: dict[str, int]
    promoted_at: str
    user: str
    flow: str | None = None
    run: str | None = None
    step: str | None = None
    key: str | None = None
    tags: tuple[str, ...] = ()
    checks: tuple[dict[str, Any], ...] = ()
    gates: tuple[dict[str, Any], ...] = ()
    note: str | None = None
    forced: str | None = None
    format_version: int = 1

    @property
    def label(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


def sizes(folder: Path) -> dict[str, int]:
    """File below ``folder`` -> its size in bytes."""
    return {item.relative_to(folder).as_posix(): item.stat().st_size for item in list_files(folder)}


@contextlib.contextmanager
def deciding(store: Store, name: str) -> Iterator[pointer.Pointer]:
    """The pointer of a model, held: no one else decides about the model meanwhile.

    Raises:
        ConfigError: the name is none that a folder could have.
        StoreError: the disk says no, or the pointer was changed by hand.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(
            "this is no name for a model",
            where="--name",
            got=name,
            expected="letters, digits, '.', '_' and '-', the first a letter or digit",
        )
    with store.lock("promote", name):
        yield pointer_of(store, name)


def record(store: Store, entry: Promoted, before: pointer.Pointer, decision: pointer.Entry) -> Promoted:
    """Write the entry as the next version of its name, make it the current one, and return it with its number.

    ``before`` comes from :func:`deciding`, whose lock the caller holds. ``decision`` says who, when and why.

    Raises:
        StoreError: the disk says no. The pointer is then what it was.
    """
    folder = store.root / "models" / entry.name
    versions = [each.version for each in versions_of(store, entry.name)]
    entry = dataclasses.replace(entry, version=max(versions, default=0) + 1)
    with disk_errors("promoting a model", folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(entry), indent=1, sort_keys=True)
        write_atomically(folder / f"{entry.version}.json", text)
        sync_folder(folder)
    pointer.append(store, entry.name, before, dataclasses.replace(decision, version=entry.version))
    return entry


def pointer_of(store: Store, name: str) -> pointer.Pointer:
    """Which version is the current one, and how that came about; raises as :func:`pointer.read`."""
    return pointer.read(store, name, [each.version for each in versions_of(store, name)])


def versions_of(store: Store, name: str) -> list[Promoted]:
    """All versions of a name, the first one first."""
    folder = store.root / "models" / name
    return sorted((_read(path) for path in folder.glob("*.json") if path.stem.isdecimal()), key=lambda e: e.version)


def all_promoted(store: Store) -> list[Promoted]:
    """All versions of all names, by name."""
    folders = sorted(path for path in (store.root / "models").glob("*") if path.is_dir())
    return [entry for folder in folders for entry in versions_of(store, folder.name)]


def find(store: Store, name: str, version: int | None, *, where: str) -> Promoted:
    """That version, or the current one.

    Raises:
        ConfigError: there is none; what there is is named.
        StoreError: the current one is asked for, and the pointer was changed by hand.
    """
    versions = versions_of(store, name)
    if not versions:
        names = sorted({entry.name for entry in all_promoted(store)})
        raise ConfigError(
            "no model was promoted by this name",
            where=where,
            got=f"models/{name}",
            expected=f"one of: {', '.join(names)}" if names else f"a promoted model; {store.root} has none",
            fix="python -m steps.promote --list shows them; a folder of that name is written ./models/...",
        )
    wanted = pointer_of(store, name).current if version is None else version
    found = next((each for each in versions if each.version == wanted), None)
    if found is None:
        have = ", ".join(str(entry.version) for entry in versions)
        raise ConfigError("there is no such version", where=where, got=f"models/{name}@{wanted}", expected=have)
    return found


def _read(path: Path) -> Promoted:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        entry = Promoted(**{**raw, **{name: tuple(raw[name]) for name in ("tags", "checks", "gates")}})
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError("the entry of a promoted model cannot be read", where=path, got=error) from error
    return entry
