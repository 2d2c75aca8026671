"""Which of the files that landed in a folder are new, and step ``take_rows``, which copies them into the store.

New is what no retrain before took, by content. Names and sizes tell only which file it was: a file under another name
is the same file, one of the same name with other content is named, and no clock is asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from posttrain_lib.config.retrain import GeneratedRows
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import write_atomically
from posttrain_lib.lineage.pointer import TakenFile
from posttrain_lib.lineage.store import Store, disk_errors
from posttrain_lib.schema.manifests import ArtifactRef
from steps.base import Manifests, Step, StepContext, StepResult, known_digests

T = TypeVar("T")

_BLOCK = 1 << 20
#: kinds to which lines may be added at the end
_GROWING = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Landed:
    """What a folder has: the files to take (names below the folder), and what is worth a word about the others."""

    files: tuple[TakenFile, ...]
    remarks: tuple[str, ...]


def new_files(folder: str, taken: Sequence[TakenFile], changed: Literal["stop", "take"]) -> Landed:
    """The files of ``folder`` (local, or a store's URL) that are not among ``taken``, which is in order of taking.

    Raises:
        DataError: a file that was taken has other content by now and ``changed`` says stop; the folder cannot be read.
    """
    by_name, contents = {file.path: file for file in taken}, {file.digest: file.path for file in taken}
    found: list[TakenFile] = []
    remarks, altered = [], []
    for file in _listed(folder):
        if file.size == 0:
            remarks.append(f"{file.path} is empty: not taken")
        elif (same := contents.get(file.digest)) is not None:
            if same != file.path:
                remarks.append(f"{file.path} has the content of {same}, which was taken: not taken again")
        elif (before := by_name.get(file.path)) is None:
            found.append(file)
        elif _grew(_place(folder, file.path), before, file.size):
            remarks.append(f"{file.path} grew from {before.size:,} to {file.size:,} bytes: the new lines are taken")
            found.append(TakenFile(file.path, file.size, file.digest, before.size))
        else:
            altered.append(f"{file.path} ({before.size:,} bytes, {before.digest[:12]} when it was taken)")
            found.append(file)
        contents.setdefault(file.digest, file.path)
    if altered and changed == "stop":
        raise DataError(
            "files were changed after a retrain had taken them",
            where=folder,
            got=", ".join(altered),
            expected="files that are written once; corrections in files of their own",
            fix="put them back; or, to train on them as they are now: landing.changed: take",
        )
    remarks += [f"{file} was changed after it was taken: taken again" for file in altered]
    return Landed(tuple(found), tuple(remarks))


def land_generated(store: Store, model: str, wanted: GeneratedRows, taken: Sequence[TakenFile]) -> str:
    """The folder where generated rows land; one more file is in it where all that it had was taken.

    The rows of a file go by the seed and its number, so whoever lands it, lands the same.
    """
    from posttrain_lib.embedded.conversations import generate_rows

    folder = store.root / "landed" / model
    names = {file.path for file in taken}
    with store.lock("land", model), disk_errors("landing rows", folder):
        folder.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in folder.glob("*.jsonl")}
        if there <= names:
            number = len(there | names) + 1
            rows = generate_rows(wanted.rows, wanted.seed + number)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(folder / f"rows-{number:05d}.jsonl", text)
    return str(folder)


@dataclass(frozen=True)
class RowsToTake:
    """What step ``take_rows`` depends on, in the place of a run file."""

    folder: str
    files: tuple[TakenFile, ...]


def settings(config: RowsToTake) -> list[Any]:
    """Names and parts; the content enters the key by its digest, and where it lay not at all."""
    return [[file.path, file.first_byte, file.size] for file in config.files]


def inputs(config: RowsToTake, _: Manifests) -> dict[str, ArtifactRef]:
    """The files."""
    return {file.path: ArtifactRef(_place(config.folder, file.path), "rows", file.digest) for file in config.files}


def body(context: StepContext) -> StepResult:
    """Copy what was new, and hold it against the digests under which it was found."""
    config: RowsToTake = context.config  # type: ignore[assignment]
    total = 0
    for file in config.files:
        name = PurePosixPath(file.path)
        if file.first_byte:
            name = name.with_name(f"{name.stem}.from-byte-{file.first_byte}{name.suffix}")
        target = context.out / "rows" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = _copy(context.inputs[file.path].uri, file, target)
        if digest != file.digest:
            raise DataError(
                "a file was changed while it was taken",
                where=context.inputs[file.path].uri,
                got=f"digest {digest[:12]}",
                expected=file.digest[:12],
                fix="start the run again; write files under another name and rename them when they are whole",
            )
        total += file.size - file.first_byte
    return StepResult({"rows": ("rows", "rows")}, summary=f"took {len(config.files)} files, {total:,} bytes")


def _listed(folder: str) -> list[TakenFile]:
    """Every file of rows by its name below the folder, sorted; none where the folder is empty."""
    from posttrain_lib.data.remote import file_system, patiently
    from posttrain_lib.data.sources import list_files

    filesystem, inner = file_system(folder)
    if "://" not in folder and not Path(inner).is_dir():
        raise DataError(
            "the folder where rows land is not there",
            where="landing.path",
            got=folder,
            fix="make it, or mend the path: an empty folder is a day without rows, a missing one is a mistake",
        )
    filesystem.invalidate_cache()
    sizes = {name: told["size"] for name, told in patiently(folder, lambda: _found(filesystem, inner)).items()}
    if not any(_is_whole(name.removeprefix(inner.rstrip("/") + "/")) for name in sizes):
        return []
    known = known_digests()
    found = []
    for file, digest in list_files(folder, known):
        name = file_system(file)[1]
        if name == inner:
            raise DataError(
                "the folder where rows land is a datasets folder: one thing, and no files that come one by one",
                where="landing.path",
                got=folder,
                fix="let files of JSON lines or Parquet land in a folder of their own",
            )
        size = sizes.get(name)
        if size is None:
            continue  # it landed since; the next look finds it
        if "://" in file:  # the store's word for a version is another for the same content, written again
            digest = known.remote(file, size, digest, partial(digest_of_first, file, size))
        found.append(TakenFile(name.removeprefix(inner.rstrip("/") + "/"), size, digest))
    known.save()
    return found


def _is_whole(name: str) -> bool:
    """Whether no part of a file's name marks it as one that is being written."""
    return not any(part.startswith((".", "_")) and "=" not in part for part in name.split("/"))


def _found(filesystem: Any, inner: str) -> dict[str, Any]:
    found: dict[str, Any] = filesystem.find(inner, detail=True)
    return found


def _place(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _grew(file: str, before: TakenFile, size: int) -> bool:
    """Whether lines were added to a file behind what was taken of it, and nothing else was changed."""
    if not file.endswith(_GROWING) or size <= before.size:
        return False

    def attempt() -> bool:
        state, last, behind = hashlib.sha256(), b"", b""
        for position, block in _blocks(file, before.size + 1):
            behind = block[before.size - position :]
            old = block[: before.size - position]
            state.update(old)
            last = old[-1:] or last
        return state.hexdigest() == before.digest and b"\n" in (last, behind)

    return _read(file, attempt)


def _copy(source: str, file: TakenFile, target: Path) -> str:
    """Copy the part of the file that is to be taken; the digest of all that was read."""

    def attempt() -> str:
        state = hashlib.sha256()
        with open(target, "wb") as copy:
            for position, block in _blocks(source, file.size):
                state.update(block)
                copy.write(block[max(0, file.first_byte - position) :])
        return state.hexdigest()

    return _read(source, attempt)


def digest_of_first(file: str, size: int) -> str:
    """sha256 hex of the first ``size`` bytes of a local or remote file.

    Raises:
        DataError: it cannot be read.
    """

    def attempt() -> str:
        state = hashlib.sha256()
        for _, block in _blocks(file, size):
            state.update(block)
        return state.hexdigest()

    return _read(file, attempt)


def _read(file: str, attempt: Callable[[], T]) -> T:
    """The attempt's result; a store's faults are outlasted, or told with the file's name."""
    from posttrain_lib.data.remote import patiently
    from posttrain_lib.data.sources import client_errors

    with client_errors(file):
        return patiently(file, attempt)


def _blocks(file: str, size: int) -> Iterator[tuple[int, bytes]]:
    """The first ``size`` bytes of a local or remote file, in blocks, each behind its offset."""
    from posttrain_lib.data.remote import file_system

    filesystem, inner = file_system(file)
    position = 0
    with filesystem.open(inner, "rb") as handle:
        while block := handle.read(min(_BLOCK, size - position)):
            yield position, block
            position += len(block)


STEP: Step = Step("take_rows", 1, "steps.landed", settings, inputs, body)  # type: ignore[arg-type]
