"""The artifact store: content-addressed results of steps in a local folder.

<root>/steps/<step>/<key>/   a published result; ``manifest.json`` and ``files.json`` were written last, and the
                             whole folder appeared by one rename, so what is there is whole
<root>/work/<step>/<key>/    what an interrupted step may continue from (training checkpoints)
<root>/tmp/                  results being written or removed; never read
<root>/locks/                one lock file per key: equal work waits for the first and then reuses it; another one says
                             that a running step reads the result
<root>/models/               promoted models (lineage/promoted.py)
<root>/records/              what manifests name by digest alone: patches, lists of files (lineage/kept.py)
<root>/names/<flow>/         what the names of models in a run's config stood for when it began (steps/start_from.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.digests import digest_text, list_files, sync_folder, write_atomically
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.schema.manifests import FORMAT_VERSION, ArtifactRef, StepManifest

STORE_VARIABLE = "POSTTRAIN_STORE"
MANIFEST = "manifest.json"
FILES = "files.json"
#: times that the results of a step are listed again because one was gone by the time that it was looked at
_LOOKS = 8
_PUBLISHED = re.compile(r"(?P<folder>/.*/steps/(?P<step>\w+)/(?P<key>[0-9a-f]{64}))(?:/.*)?")


def default_root() -> Path:
    """``$POSTTRAIN_STORE``, else ``.posttrain/`` in the checkout (ignored by git)."""
    named = os.environ.get(STORE_VARIABLE)
    if named and "://" in named:
        raise StoreError(
            "the store must be a local folder",
            where=f"${STORE_VARIABLE}",
            got=named,
            expected="a path such as /data/posttrain",
        )
    return Path(named).expanduser().resolve() if named else PROJECT_ROOT / ".posttrain"


@dataclass(frozen=True)
class Entry:
    """One published result or work folder, for listings."""

    kind: str
    step: str
    key: str
    path: Path
    size_bytes: int
    used_at: float


class Store:
    """Publishes, finds and removes results. All methods raise :class:`StoreError` where the disk says no."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def result_folder(self, step: str, key: str) -> Path:
        """Where the published result of (step, key) stands."""
        return self.root / "steps" / step / key

    def work_folder(self, step: str, key: str) -> Path:
        """Scratch space of (step, key) that outlives an interrupted attempt."""
        return self.root / "work" / step / key

    def find(self, step: str, key: str) -> StepManifest | None:
        """The published result, or None. A result whose files went missing or changed size is set aside, not used: ask
        under the lock of (step, key), or one that is just being replaced looks like that."""
        folder = self.result_folder(step, key)
        if not folder.exists():
            return None
        manifest = read_manifest(folder)
        problem = f"{MANIFEST} is missing" if manifest is None else first_damage(folder)
        if problem is not None:
            aside = self.root / "tmp" / f"damaged-{step}-{key[:12]}-{uuid.uuid4().hex[:8]}"
            with disk_errors("setting a damaged result aside", folder):
                aside.parent.mkdir(parents=True, exist_ok=True)
                os.rename(folder, aside)
            print(
                f"{step}: stored result {key[:12]} is damaged ({problem}); set aside at {aside}, doing the work again"
            )
            return None
        with disk_errors("noting the use of a result", folder):
            os.utime(folder / MANIFEST)  # last use, for the clean-up
        return None if manifest is None else self._as_placed_now(manifest)

    def _as_placed_now(self, manifest: StepManifest) -> StepManifest:
        """The manifest with the places of this store, which may have been moved or copied since it was published."""
        own = (manifest.step, manifest.key)

        def now(ref: ArtifactRef) -> ArtifactRef:
            place = published_place(ref.uri)
            if place is None:
                return ref
            here = self.result_folder(*place[1:])
            moved = place[1:] == own or (here.is_dir() and not place[0].is_dir())
            return dataclasses.replace(ref, uri=f"{here}{ref.uri.removeprefix(str(place[0]))}") if moved else ref

        inputs, outputs = (
            {name: now(ref) for name, ref in refs.items()} for refs in (manifest.inputs, manifest.outputs)
        )
        placed = dataclasses.replace(manifest, inputs=inputs, outputs=outputs)
        return manifest if placed == manifest else dataclasses.replace(placed, digest=manifest_digest(placed))

    def newest(self, step: str, flow: str | None = None) -> StepManifest | None:
        """The last published or reused result of ``step`` whatever its key, to say what changed since; the last that a
        run of ``flow`` made, where there is one."""
        for _ in range(_LOOKS):
            with contextlib.suppress(FileNotFoundError):  # a clean-up or another run may take or replace one meanwhile
                return self._newest(step, flow)
        return None

    def _newest(self, step: str, flow: str | None) -> StepManifest | None:
        files = sorted((self.root / "steps" / step).glob(f"*/{MANIFEST}"), key=lambda file: -file.stat().st_mtime)
        for file in files if flow is not None else ():
            if f'"{flow}"' in file.read_text(encoding="utf-8"):  # others need not be read as manifests
                found = _parse(file)
                if found.made_by is not None and found.made_by.flow == flow:
                    return found
        return _parse(files[0]) if files else None  # its digest is looked at where the result is used

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh folder on the store's disk, removed if it was not published."""
        with self._place_aside() as folder:
            with disk_errors("making a folder in the store", folder):
                folder.mkdir()
            yield folder

    @contextlib.contextmanager
    def _place_aside(self) -> Iterator[Path]:
        """A path in ``tmp/`` at which nothing is yet; what is then left there is removed."""
        place = self.root / "tmp" / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        with disk_errors("making a folder in the store", place.parent):
            place.parent.mkdir(parents=True, exist_ok=True)
        with self.lock("tmp", place.name):  # the clean-up leaves it alone, however long the step takes
            try:
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)
                self._lock_file("tmp", place.name).unlink()  # no other process will ask for this name

    def publish(self, folder: Path, manifest: StepManifest) -> StepManifest:
        """Make ``folder`` the result of (manifest.step, manifest.key), at once and whole; the manifest comes back with
        its digest."""
        target = self.result_folder(manifest.step, manifest.key)
        manifest = dataclasses.replace(manifest, digest=manifest_digest(manifest))
        with disk_errors("publishing a result", target):
            listing = {item.relative_to(folder).as_posix(): item.stat().st_size for item in list_files(folder)}
            write_atomically(folder / FILES, json.dumps(listing, indent=1, sort_keys=True))
            write_atomically(folder / MANIFEST, json.dumps(manifest.to_dict(), indent=1, sort_keys=True))
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._place_aside() as aside:  # one that work done afresh replaces is there up to here, and goes whole
                if target.exists():
                    os.rename(target, aside)
                os.rename(folder, target)
            sync_folder(target.parent)
        return manifest

    @contextlib.contextmanager
    def lock(self, step: str, key: str, say: Callable[[str], None] = print) -> Iterator[None]:
        """Hold (step, key) alone. The kernel drops the lock of a killed process, so none is ever stale."""
        path = self._lock_file(step, key)
        with disk_errors("locking a key", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below, after the lock is released
        with handle:
            if not _try_lock(handle):
                handle.seek(0)
                say(
                    f"{step}: the same work is under way in another run ({handle.read().strip() or 'unknown'}); waiting"
                )
                _wait_for_lock(handle)
            _note_holder(handle)
            yield

    @contextlib.contextmanager
    def reading(self, results: Iterable[tuple[str, str]]) -> Iterator[None]:
        """Keep (step, key) of ``results`` from being removed meanwhile. Any number may read, and nobody waits."""
        with contextlib.ExitStack() as held:
            for step, key in results:
                path = self._lock_file(f"reading-{step}", key)
                with disk_errors("locking an input", path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    handle = held.enter_context(open(path, "a", encoding="utf-8"))
                    fcntl.flock(handle, fcntl.LOCK_SH)
            yield

    def _lock_file(self, step: str, key: str) -> Path:
        return self.root / "locks" / f"{step}-{key}.lock"

    def entries(self) -> list[Entry]:
        """Everything in the store that takes space, oldest use first."""
        places = [(kind, folder) for kind in ("steps", "work") for folder in (self.root / kind).glob("*/*")]
        places += [("tmp", folder) for folder in (self.root / "tmp").glob("*")]
        found = []
        for kind, folder in sorted(places):
            size, used_at = _size_and_use(folder)
            step = "-" if kind == "tmp" else folder.parent.name
            found.append(Entry(kind, step, folder.name, folder, size, used_at))
        return sorted(found, key=lambda entry: entry.used_at)

    def remove(self, entry: Entry) -> bool:
        """Remove one entry; False if a running step holds or reads it, or it was used since it was listed.

        It disappears by one rename, so that nobody finds half of it.
        """
        names = {
            "steps": (entry.step, f"reading-{entry.step}"),
            "work": (entry.step, f"{entry.step}-work"),
            "tmp": ("tmp",),
        }
        with contextlib.ExitStack() as held, disk_errors("removing an entry", entry.path):
            for name in names[entry.kind]:
                path = self._lock_file(name, entry.key)
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = held.enter_context(open(path, "a+", encoding="utf-8"))
                if not _try_lock(handle):
                    return False
            if not entry.path.exists() or _size_and_use(entry.path)[1] > entry.used_at:
                return False
            # Held, so that another clean-up does not take it for left over. No folder is made: a full disk has no room.
            with self._place_aside() as aside:
                os.rename(entry.path, aside)
                if aside.is_dir():
                    shutil.rmtree(aside)
                else:
                    aside.unlink()
            if entry.kind == "tmp":
                self._lock_file("tmp", entry.key).unlink()  # no other process will ask for this name
        return True


@contextlib.contextmanager
def disk_errors(doing: str, where: object) -> Iterator[None]:
    """Turn the operating system's refusals into a :class:`StoreError` that says what to do."""
    fixes = {
        errno.ENOSPC: "free space (python -m steps.store clean --remove) or point POSTTRAIN_STORE at a larger disk",
        errno.EDQUOT: "free space or raise the quota",
        errno.EROFS: "point POSTTRAIN_STORE at a folder that can be written",
        errno.EACCES: "point POSTTRAIN_STORE at a folder that you may write",
    }
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{doing} failed", where=error.filename or where, got=error.strerror, fix=fixes.get(error.errno or 0)
        ) from error


def _size_and_use(path: Path) -> tuple[int, float]:
    """Bytes; and the last use of a result, of anything else the last change of whatever is in it, in seconds since the
    epoch. Running steps write and remove files meanwhile: one that vanishes counts nothing.
    """
    size, changed = 0, 0.0
    for each in [path, *(Path(at, name) for at, _, names in os.walk(path) for name in names)]:
        with contextlib.suppress(FileNotFoundError):
            status = each.stat()
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
            changed = max(changed, status.st_mtime)
    with contextlib.suppress(FileNotFoundError):
        return size, (path / MANIFEST).stat().st_mtime
    return size, changed


def _try_lock(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _wait_for_lock(handle: IO[str]) -> None:
    # Polling instead of a blocking flock: a blocked system call would hold up Ctrl-C and Metaflow's @timeout.
    while not _try_lock(handle):
        time.sleep(0.5)


def _note_holder(handle: IO[str]) -> None:
    # For people alone: on a full disk the lock holds all the same, and the clean-up, which makes room, needs it.
    with contextlib.suppress(OSError):
        os.ftruncate(handle.fileno(), 0)
        os.write(handle.fileno(), f"process {os.getpid()}".encode())


def published_place(uri: str) -> tuple[Path, str, str] | None:
    """(folder, step, key) of the published result that a place lies in; None where it lies in none."""
    found = _PUBLISHED.fullmatch(uri)
    return None if found is None else (Path(found["folder"]), found["step"], found["key"])


def manifest_digest(manifest: StepManifest) -> str:
    """sha256 of all that a manifest says but its digest, and but ``reused``, which the reader sets."""
    plain = manifest.to_dict()
    del plain["digest"], plain["reused"]
    # Through JSON first: numbers that are keys become text, and are sorted as such. Metrics may be NaN.
    plain = json.loads(json.dumps(plain))
    return digest_text(json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def read_manifest(folder: Path) -> StepManifest | None:
    """Of a published result; None where the folder is none.

    Raises:
        StoreError: the manifest cannot be read, or is not as it was published.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = _parse(path)
    check_manifest(manifest, path)
    return manifest


def check_manifest(manifest: StepManifest, where: object, fix: str | None = None) -> None:
    """It says what it said when it was published. Format 1 had no digest, and is taken as it is.

    Raises:
        StoreError: it was changed since; ``fix`` says what to do, default: as for a result in the store.
    """
    if manifest.format_version > 1 and manifest.digest != (now := manifest_digest(manifest)):
        raise StoreError(
            "the manifest was changed after it was published",
            where=where,
            got=f"digest {now[:12]}",
            expected=manifest.digest[:12] or "a digest",
            fix=fix
            or f"undo the change, or remove the result's folder: a run that needs {manifest.step} makes it again",
        )


def _parse(path: Path) -> StepManifest:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
        if version <= FORMAT_VERSION:
            return StepManifest.from_dict(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            "the manifest cannot be read: it is torn, or was changed by hand",
            where=path,
            got=f"{type(error).__name__}: {error}",
            fix="remove the result's folder: a run that needs it makes it again",
        ) from error
    raise StoreError(
        "the manifest is of a newer version of this project",
        where=path,
        got=f"format {version}",
        expected=f"at most {FORMAT_VERSION}",
        fix="update the checkout, or use another store",
    )


def first_damage(folder: Path) -> str | None:
    """The first file of a published result that is missing or has another size, None where all is whole."""
    try:
        listing = json.loads((folder / FILES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{FILES} is missing"
    except ValueError:
        return f"{FILES} is torn"
    for name, size in listing.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None
