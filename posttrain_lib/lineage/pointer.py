"""Which version of a promoted model is the current one, and how that came about.

<root>/models/<name>/pointer.json      the current version and every entry of the history, replaced as one file: a move
                                       and its entry are there together, or neither is
<root>/models/<name>/newest.json       number and digest of the newest entry, written behind the pointer
<root>/models/<name>/rows/<digest>.json  the rows that a retrain took, named by their own digest (:class:`TakenRows`)

Entries are only ever added. Each holds the digest of the one before it, so that an entry changed, taken out or put in
by hand is named, and so is a current version that the last entry did not make current. Entries cut off at the end leave
a chain that holds; it is then shorter than newest.json says, and versions promoted by what was cut have no entry.
Whoever makes newest.json fit hides rollbacks and rejections behind the last promotion that is left: nothing else
notes them. A copy of the history kept elsewhere would tell.

A pointer that is gone is no reason to take another version for the current one: :func:`read` refuses, also versions of
before there were pointers; a rollback says which is the current one and begins the history anew.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.digests import digest_value, sync_folder, write_atomically
from posttrain_lib.lineage.store import Store, disk_errors

FILE = "pointer.json"
NEWEST = "newest.json"
ROWS = "rows"
#: what the pointer is written as; entries of 1 hold no digests of records
FORMAT_VERSION = 2

Action = Literal["promoted", "rolled back", "rejected", "kept out"]


@dataclass(frozen=True)
class Entry:
    """One decision about a model.

    Attributes:
        number: from 1.
        action: promoted: a version became the current one for the first time. rolled back: an earlier one did again.
            rejected: a candidate's gates did not hold. kept out: it was compared with a version that is no longer the
            current one.
        version, before: the current version behind the decision and before it; None where there was none.
        at: UTC, as ISO 8601. It tells; the order of entries is that of their numbers, whatever a clock said.
        by, run: who, and the flow's run as ``RetrainFlow/<id>``; None of a call of the command line.
        why: in words.
        candidate: digest of what a retrain decided on; the same candidate is not decided on twice.
        rows: digest of the :class:`TakenRows` that the candidate was trained on, where they count as taken.
        gates: {name, value, limit, sense, holds} of each gate.
        previous: digest of the entry before, "" of the first.
        records: version -> sha256 of its file <version>.json, of those that the entry vouches for: the one that it
            makes current, and all that there are where the history begins anew. None in format 1.
    """

    number: int
    action: Action
    version: int | None
    before: int | None
    at: str
    by: str
    why: str
    previous: str
    run: str | None = None
    candidate: str | None = None
    rows: str | None = None
    gates: tuple[dict[str, Any], ...] = ()
    records: dict[str, str] | None = None

    def digest(self) -> str:
        """sha256 over all fields, the digest of the entry before among them."""
        fields = dataclasses.asdict(self)
        if self.records is None:
            del fields["records"]  # as format 1 was digested
        return digest_value(fields)


@dataclass(frozen=True)
class Pointer:
    """The current version of a model, None where there is none, and the decisions that led to it."""

    current: int | None
    history: tuple[Entry, ...] = ()

    @property
    def records(self) -> dict[int, str]:
        """Version -> sha256 of its file <version>.json, where an entry notes it."""
        return {int(version): digest for entry in self.history for version, digest in (entry.records or {}).items()}

    @property
    def with_entry(self) -> set[int]:
        """The versions that some entry made current or vouches for."""
        return {*self.records, *(entry.version for entry in self.history if entry.version is not None)}


@dataclass(frozen=True)
class TakenFile:
    """A file that a retrain took, or a part of it: rows behind ``first_byte``.

    ``size`` and ``digest`` (sha256, or of an object in a store what tells its version) are the whole file's.
    """

    path: str
    size: int
    digest: str
    first_byte: int = 0


@dataclass(frozen=True)
class TakenRows:
    """The files that a retrain of ``model`` took, beside the version that it began with."""

    model: str
    base: int | None
    files: tuple[TakenFile, ...]

    def digest(self) -> str:
        """sha256 of the content; the file that holds it is named so."""
        return digest_value(dataclasses.asdict(self))


def utc_now() -> str:
    """The time in UTC with its offset, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def rollback_command(name: str, version: object = "VERSION") -> str:
    """The command that makes a version the current one, for messages."""
    return f"python -m steps.promote --name {name} --rollback {version} --note WHY"


def read(store: Store, name: str, versions: Sequence[int], *, settling: bool = False) -> Pointer:
    """The pointer of a model that has these versions.

    ``settling``: for a decision that says anew which version is the current one. Where the file is gone, where it names
    another version than its history does, or one without a record, ``current`` is then None instead of an error.

    Raises:
        StoreError: the file is gone, cannot be read, was changed by hand or cut; what is wrong and how to mend it is
            said.
    """
    path = _path(store, name)
    if not path.is_file():
        if settling or not versions:
            return Pointer(None)
        raise StoreError(
            "the pointer of a promoted model is gone: which version is the current one is not known",
            where=path,
            got=f"versions {_listed(versions)} without it",
            fix=f"put the file back from a backup; or {_ANEW.format(command=rollback_command(name))}",
        )
    current, entries = _parsed(path, name)
    _check_end(path, name, entries)
    problem = _astray(path, name, current, entries, versions)
    if problem is not None and not settling:
        raise problem
    return Pointer(current if problem is None else None, entries)


def begin(store: Store, name: str) -> None:
    """Write an empty history where there is none. It comes before the first version's record, so that a record without
    a pointer always means that the pointer was lost.

    Raises:
        StoreError: the disk says no.
    """
    if not _path(store, name).is_file():
        _write(_path(store, name), None, ())


def append(store: Store, name: str, before: Pointer, entry: Entry) -> Pointer:
    """The pointer with one more entry, and the version that it makes current. The caller holds the model's lock.

    Raises:
        StoreError: the disk says no; the pointer is then what it was, or the error says that the decision stands.
    """
    path = _path(store, name)
    entry = dataclasses.replace(
        entry,
        number=len(before.history) + 1,
        before=before.current,
        previous=before.history[-1].digest() if before.history else "",
    )
    history = (*before.history, entry)
    newest = path.with_name(NEWEST)
    if not before.history:
        newest.unlink(missing_ok=True)  # of a history that was lost; this one must not be held to it
    _write(path, entry.version, history)
    # Behind the pointer: a writer killed in between leaves a note that lags, which every longer history agrees with.
    with disk_errors("the decision was written and stands; noting it as the newest one", newest):
        write_atomically(newest, json.dumps({"number": entry.number, "digest": entry.digest()}))
        sync_folder(path.parent)
    return Pointer(entry.version, history)


def newest_noted(store: Store, name: str) -> int | None:
    """The number in newest.json, which :func:`read` compares with the history; None where there is no such file."""
    noted = _noted(_path(store, name).with_name(NEWEST))
    return None if noted is None else noted[0]


def keep_rows(store: Store, rows: TakenRows) -> str:
    """Write what a retrain took, and return its digest; what is there already is left as it is.

    Raises:
        StoreError: the disk says no.
    """
    path = _path(store, rows.model).parent / ROWS / f"{rows.digest()}.json"
    if not path.is_file():
        with disk_errors("noting the rows of a retrain", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(dataclasses.asdict(rows), indent=1))
            sync_folder(path.parent)
    return rows.digest()


def rows_of(store: Store, name: str, digest: str) -> TakenRows:
    """What a retrain took.

    Raises:
        StoreError: the file is gone or was changed.
    """
    path = _path(store, name).parent / ROWS / f"{digest}.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rows = TakenRows(raw["model"], raw["base"], tuple(TakenFile(**file) for file in raw["files"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            "the list of files that a retrain took cannot be read",
            where=path,
            got=f"{type(error).__name__}: {error}",
            fix="put the file back from a backup: without it, rows would be taken twice",
        ) from error
    if rows.digest() != digest:
        raise StoreError(
            "the list of files that a retrain took was changed by hand",
            where=path,
            got=f"digest {rows.digest()[:12]}",
            expected=digest[:12],
            fix="put the file back from a backup: without it, rows would be taken twice",
        )
    return rows


def _path(store: Store, name: str) -> Path:
    return store.root / "models" / name / FILE


#: what to do where a history cannot be had back
_ANEW = (
    "say which version is the current one: {command}. The history then begins anew, and rows that retrains took are "
    "new to them again"
)


def _write(path: Path, current: int | None, history: Sequence[Entry]) -> None:
    items = [{"digest": each.digest(), "entry": dataclasses.asdict(each)} for each in history]
    text = json.dumps({"format_version": FORMAT_VERSION, "current": current, "history": items}, indent=1)
    with disk_errors("moving the pointer of a model", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        sync_folder(path.parent)


def _parsed(path: Path, name: str) -> tuple[int | None, tuple[Entry, ...]]:
    """What stands in the file, its chain of digests followed."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        written_as = int(raw.get("format_version", 1))
        if written_as > FORMAT_VERSION:
            raise StoreError(
                "the pointer of a promoted model was written by a newer version of this project",
                where=path,
                got=f"format {written_as}",
                expected=f"at most {FORMAT_VERSION}",
                fix="update this checkout; the file is left as it is",
            )
        history = [
            (Entry(**{**entry, "gates": tuple(entry["gates"])}), digest)
            for entry, digest in ((dict(item["entry"]), str(item["digest"])) for item in raw["history"])
        ]
        current = raw["current"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise _lost(path, name, "the pointer of a promoted model is damaged and cannot be read", got=got) from error
    previous = ""
    for number, (entry, digest) in enumerate(history, 1):
        if (entry.number, entry.previous, entry.digest()) != (number, previous, digest):
            raise _lost(
                path,
                name,
                f"the pointer of a promoted model was changed by hand: entry {number} of the history is not what was "
                "written",
                got=f"{entry.action} at {entry.at} by {entry.by}, digest {entry.digest()[:12]}",
                expected=f"number {number}, digest {digest[:12]}, behind {previous[:12] or 'nothing'}",
            )
        previous = digest
    return current, tuple(entry for entry, _ in history)


def _check_end(path: Path, name: str, entries: Sequence[Entry]) -> None:
    """The history goes at least as far as the note of its newest entry."""
    noted = _noted(path.with_name(NEWEST))
    if noted is None:
        return
    number, digest = noted
    found = entries[number - 1].digest() if 0 < number <= len(entries) else None
    if found != digest:
        raise _lost(
            path,
            name,
            "the history of a promoted model was cut off at its end",
            got=f"{len(entries)} entries" if found is None else f"entry {number} with digest {found[:12]}",
            expected=f"entry {number} with digest {digest[:12]}, as {NEWEST} beside it notes",
        )


def _noted(path: Path) -> tuple[int, str] | None:
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return int(raw["number"]), str(raw["digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            "the note of a history's newest entry is damaged and cannot be read",
            where=path,
            got=f"{type(error).__name__}: {error}",
            fix="put the file back from a backup; or move it away (the next decision writes it) and see whether "
            "--history ends with the newest decision that you know of",
        ) from error


def _astray(
    path: Path, name: str, current: int | None, entries: Sequence[Entry], versions: Sequence[int]
) -> StoreError | None:
    """What is wrong with the current version, where the history itself holds."""
    last = entries[-1].version if entries else None
    if current != last:
        wanted = rollback_command(name, current if current in versions else "VERSION")
        again = f'write "current": {json.dumps(last)} again'
        return StoreError(
            "the pointer of a promoted model was changed by hand",
            where=path,
            got=f"current: {current}",
            expected=f"{last}, which the last entry of its history made current",
            fix=f"{again}; or say which version is to be the current one: {wanted}" if versions else again,
        )
    if current is not None and current not in versions:
        back = "put the file back from a backup"
        return StoreError(
            "the current version of a promoted model has no record any more",
            where=path.with_name(f"{current}.json"),
            got=f"versions {_listed(versions)}",
            fix=f"{back}; or go back to another one: {rollback_command(name)}" if versions else back,
        )
    return None


def _listed(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "none"


def _lost(path: Path, name: str, what: str, **said: Any) -> StoreError:
    return StoreError(
        what,
        where=path,
        **said,
        fix=f"put the file back from a backup; or move it away and {_ANEW.format(command=rollback_command(name))}",
    )
