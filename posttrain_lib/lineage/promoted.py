"""Promoted models: names that people gave to results, kept in the store.

<root>/models/<name>/<version>.json   one version: which folder, its digest and sizes, which run made it, who promoted
                                      it, when and why. Versions count up from 1; none is changed or removed
<root>/models/<name>/pointer.json     which of them is the current one, and every decision about it (pointer.py); the
                                      entry that made a version current holds the digest of its file
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ConfigError, ModelError, StoreError
from posttrain_lib.lineage import pointer
from posttrain_lib.lineage.digests import FileDigests, digest_file, list_files, sync_folder, write_atomically
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
def deciding(store: Store, name: str, *, settling: bool = False) -> Iterator[pointer.Pointer]:
    """The pointer of a model, held: no one else decides about the model meanwhile. ``settling`` as of
    :func:`pointer.read`.

    Raises:
        ConfigError: the name is none that a folder could have.
        StoreError: the disk says no, or the pointer is lost, damaged or was changed by hand.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(
            "this is no name for a model",
            where="--name",
            got=name,
            expected="letters, digits, '.', '_' and '-', the first a letter or digit",
        )
    with store.lock("promote", name):
        yield pointer_of(store, name, settling=settling)


def record(store: Store, entry: Promoted, before: pointer.Pointer, decision: pointer.Entry) -> Promoted:
    """Write the entry as the next version of its name, make it the current one, and return it with its number.

    ``before`` comes from :func:`deciding`, whose lock the caller holds. ``decision`` says who, when and why.

    Raises:
        ModelError: the folder is not byte for byte what the entry says.
        StoreError: the disk says no. The pointer is then what it was, or the error says that the decision stands.
    """
    now = _digest(Path(entry.path))
    if now != entry.digest:
        made = (
            f"remove {Path(entry.path).parent}, which its flow then makes again" if entry.key else "put the folder back"
        )
        raise ModelError(
            "the folder was changed after it was published",
            where=entry.path,
            got=f"digest {now[:12]}",
            expected=f"digest {entry.digest[:12]}",
            fix=f"{made}; or promote another one",
        )
    pointer.begin(store, entry.name)
    version = max({*numbers_of(store, entry.name), *before.with_entry}, default=0) + 1
    entry = dataclasses.replace(entry, version=version)
    path = record_file(store, entry.name, version)
    with disk_errors("promoting a model", path):
        write_atomically(path, json.dumps(dataclasses.asdict(entry), indent=1, sort_keys=True))
        sync_folder(path.parent)
    records = record_digests(store, entry.name, [version])
    pointer.append(store, entry.name, before, dataclasses.replace(decision, version=version, records=records))
    return entry


def pointer_of(store: Store, name: str, *, settling: bool = False) -> pointer.Pointer:
    """Which version is the current one, and how that came about; raises as :func:`pointer.read`."""
    return pointer.read(store, name, numbers_of(store, name), settling=settling)


def numbers_of(store: Store, name: str) -> list[int]:
    """The numbers of all versions of a name that have a record, in order."""
    folder = store.root / "models" / name
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def versions_of(store: Store, name: str) -> list[Promoted]:
    """All versions of a name, the first one first."""
    return [_read(record_file(store, name, version)) for version in numbers_of(store, name)]


def record_file(store: Store, name: str, version: int) -> Path:
    """Where the record of a version is."""
    return store.root / "models" / name / f"{version}.json"


def record_digests(store: Store, name: str, versions: Iterable[int]) -> dict[str, str]:
    """Version -> sha256 of its record, as an entry of the history holds them."""
    return {str(version): digest_file(record_file(store, name, version)) for version in versions}


def check_record(store: Store, name: str, version: int, found: pointer.Pointer) -> None:
    """A version's record is the one that its entry in the history names; of format 1, no entry names one.

    Raises:
        StoreError: the record is gone or was changed.
    """
    expected = found.records.get(version)
    path = record_file(store, name, version)
    now = digest_file(path) if path.is_file() else None
    if expected is not None and now != expected:
        raise StoreError(
            f"the record of a promoted version {'is gone' if now is None else 'was changed after it was written'}",
            where=path,
            got="no file" if now is None else f"sha256 {now[:12]}",
            expected=f"{expected[:12]}, as the history notes of models/{name}@{version}",
            fix=f"put the file back from a backup; or go back to another version: {pointer.rollback_command(name)}",
        )


def check_folder(store: Store, entry: Promoted, *, where: str) -> None:
    """A version's folder is byte for byte what was promoted.

    Raises:
        ModelError: it is not; which other versions there are to go back to is said.
    """
    folder = Path(entry.path)
    now = _digest(folder) if folder.is_dir() else None
    if now == entry.digest:
        return
    current = pointer_of(store, entry.name, settling=True).current
    others = [
        str(version)
        for version in numbers_of(store, entry.name)
        if version not in (entry.version, current) and _seems_whole(store, entry.name, version)
    ]
    made = f"make it again from {entry.flow}/{entry.run}" if entry.run is not None else "put the folder back"
    back = pointer.rollback_command(entry.name)
    raise ModelError(
        f"the folder of version {entry.version} is not what was promoted",
        where=where,
        got=f"models/{entry.label}: {folder}: {'the folder is gone' if now is None else f'digest {now[:12]}'}",
        expected=f"digest {entry.digest[:12]}",
        fix=f"{made}; or take another version ({', '.join(others)}): {back}"
        if others
        else f"{made}; there is no other version",
    )


def _digest(folder: Path) -> str:
    """All of it is read, and nothing remembered: a file changed behind its size and time is what this looks for."""
    return FileDigests().path(folder)


def _seems_whole(store: Store, name: str, version: int) -> bool:
    """Whether a version's record is the noted one and its folder has the files it had, each of its size; what they hold
    is not read."""
    try:
        entry = find(store, name, version, where=name)
    except StoreError:
        return False
    return Path(entry.path).is_dir() and sizes(Path(entry.path)) == entry.files


def all_promoted(store: Store) -> list[Promoted]:
    """All versions of all names, by name."""
    folders = sorted(path for path in (store.root / "models").glob("*") if path.is_dir())
    return [entry for folder in folders for entry in versions_of(store, folder.name)]


def find(store: Store, name: str, version: int | None, *, where: str) -> Promoted:
    """That version, or the current one.

    Raises:
        ConfigError: there is none; what there is is named.
        StoreError: the version's record or the history was changed by hand or is damaged; or the current one is asked
            for, and which it is is not known.
    """
    versions = numbers_of(store, name)
    if not versions:
        names = sorted({entry.name for entry in all_promoted(store)})
        raise ConfigError(
            "no model was promoted by this name",
            where=where,
            got=f"models/{name}",
            expected=f"one of: {', '.join(names)}" if names else f"a promoted model; {store.root} has none",
            fix="python -m steps.promote --list shows them; a folder of that name is written ./models/...",
        )
    found = pointer_of(store, name, settling=version is not None)
    wanted = found.current if version is None else version
    if wanted is None:
        raise ConfigError(
            "no version is the current one: the first promotion was interrupted",
            where=where,
            got=f"models/{name}",
            expected=", ".join(map(str, versions)),
            fix=f"promote it again; or {pointer.rollback_command(name)}",
        )
    check_record(store, name, wanted, found)
    if wanted not in versions:
        have = ", ".join(map(str, versions))
        raise ConfigError("there is no such version", where=where, got=f"models/{name}@{wanted}", expected=have)
    return _read(record_file(store, name, wanted))


def _read(path: Path) -> Promoted:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        entry = Promoted(**{**raw, **{name: tuple(raw[name]) for name in ("tags", "checks", "gates")}})
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            "the record of a promoted version is damaged and cannot be read",
            where=path,
            got=f"{type(error).__name__}: {error}",
            fix="put the file back from a backup",
        ) from error
    return entry
