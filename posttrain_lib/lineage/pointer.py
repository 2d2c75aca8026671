"""Which version of a promoted model is the current one, and how that came about.

<root>/models/<name>/pointer.json      the current version and every entry of the history, replaced as one file: a move
                                       and its entry are there together, or neither is
<root>/models/<name>/rows/<digest>.json  the rows that a retrain took, named by their own digest (:class:`TakenRows`)

Entries are only ever added. Each holds the digest of the one before it, so that an entry changed, taken out or put in
by hand is named, and so is a current version that the last entry did not make current. Entries cut off at the end leave
a chain that holds: their versions then count as recorded and never promoted.

A name without the file is one of before there were pointers: its latest version is the current one.
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
ROWS = "rows"

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

    def digest(self) -> str:
        """sha256 over all fields, the digest of the entry before among them."""
        return digest_value(dataclasses.asdict(self))


@dataclass(frozen=True)
class Pointer:
    """The current version of a model, None where there is none, and the decisions that led to it."""

    current: int | None
    history: tuple[Entry, ...] = ()


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


def read(store: Store, name: str, versions: Sequence[int]) -> Pointer:
    """The pointer of a model that has these versions.

    Raises:
        StoreError: the file cannot be read, or was changed by hand; what is wrong and how to mend it is said.
    """
    path = _path(store, name)
    if not path.is_file():
        return Pointer(max(versions, default=None))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        history = tuple(
            (Entry(**{**entry, "gates": tuple(entry["gates"])}), digest)
            for entry, digest in ((dict(item["entry"]), str(item["digest"])) for item in raw["history"])
        )
        current = raw["current"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _by_hand(path, "it cannot be read", got=f"{type(error).__name__}: {error}") from error
    previous = ""
    for number, (entry, digest) in enumerate(history, 1):
        if (entry.number, entry.previous, entry.digest()) != (number, previous, digest):
            raise _by_hand(
                path,
                f"entry {number} of the history is not what was written",
                got=f"{entry.action} at {entry.at} by {entry.by}, digest {entry.digest()[:12]}",
                expected=f"number {number}, digest {digest[:12]}, behind {previous[:12] or 'nothing'}",
            )
        previous = digest
    entries = tuple(entry for entry, _ in history)
    last = entries[-1].version if entries else None
    if current != last:
        raise StoreError(
            "the pointer of a promoted model was changed by hand",
            where=path,
            got=f"current: {current}",
            expected=f"{last}, which the last entry of its history made current",
            fix=f'write "current": {json.dumps(last)} again; if {current} is what you want: '
            f"python -m steps.promote --name {name} --rollback {current} --note WHY",
        )
    if current is not None and current not in versions:
        raise StoreError(
            "the current version of a promoted model has no entry any more",
            where=path.with_name(f"{current}.json"),
            got=f"versions {', '.join(map(str, versions)) or 'none'}",
            fix="put the file back",
        )
    return Pointer(current, entries)


def append(store: Store, name: str, before: Pointer, entry: Entry) -> Pointer:
    """The pointer with one more entry, and the version that it makes current. The caller holds the model's lock.

    Raises:
        StoreError: the disk says no; the pointer is then what it was.
    """
    path = _path(store, name)
    entry = dataclasses.replace(
        entry,
        number=len(before.history) + 1,
        before=before.current,
        previous=before.history[-1].digest() if before.history else "",
    )
    history = (*before.history, entry)
    items = [{"digest": each.digest(), "entry": dataclasses.asdict(each)} for each in history]
    with disk_errors("moving the pointer of a model", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"current": entry.version, "history": items}, indent=1))
        sync_folder(path.parent)
    return Pointer(entry.version, history)


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


def _by_hand(path: Path, what: str, **said: Any) -> StoreError:
    return StoreError(
        f"the pointer of a promoted model was changed by hand: {what}",
        where=path,
        **said,
        fix="put the file back from a backup; or move it away: the latest version is then the current one, the history "
        "begins anew with the next promotion, and rows that retrains took are new to them again",
    )
