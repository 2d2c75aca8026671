"""sha256 of values, files and folders."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
#: a file that changed so short before it was read may change again without another time: clocks of disks tick
_SETTLED_NS = 2_000_000_000


def digest_bytes(content: bytes) -> str:
    """sha256 hex."""
    return hashlib.sha256(content).hexdigest()


def digest_text(text: str) -> str:
    """sha256 hex of UTF-8 text."""
    return digest_bytes(text.encode("utf-8"))


def canonical(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_value(value: Any) -> str:
    """sha256 hex of a JSON value in canonical form."""
    return digest_text(canonical(value))


def digest_file(path: str | Path) -> str:
    """sha256 hex of a file's bytes."""
    state = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            state.update(block)
    return state.hexdigest()


def list_files(folder: Path) -> list[Path]:
    """Every file below ``folder``, sorted by relative POSIX path; links are followed, to folders too, but for one that
    leads to a folder which is there already."""
    found: list[Path] = []
    seen: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(at)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [path for name in names if (path := Path(at, name)).is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


class FileDigests:
    """File digests remembered by path and state (size, inode, times of the last write and of the last change), of a
    store's files by (URL, size, version), so that a large folder is read once.

    The time of the last change is the system's own: what copies, unpacks or restores a file may set the other one back,
    and two versions of a file then look alike. A file that has just changed is read, and remembered the next time.

    The memory is a JSON file, replaced atomically; losing it costs time, never correctness.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        if memory is not None and memory.is_file():
            try:
                self._known = json.loads(memory.read_text(encoding="utf-8"))
            except ValueError:
                self._known = {}  # a torn memory is rebuilt below

    def file(self, path: Path) -> str:
        """sha256 hex of ``path``."""
        path = path.resolve()
        status = path.stat()
        state = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        entry = self._known.get(str(path))
        if entry and entry[:-1] == state:
            return str(entry[-1])
        settled = max(status.st_mtime_ns, status.st_ctime_ns) < time.time_ns() - _SETTLED_NS
        digest = digest_file(path)
        if settled:
            self._known[str(path)] = [*state, digest]
        return digest

    def remote(self, url: str, size: int, version: str, read: Callable[[], str]) -> str:
        """sha256 hex of a store's file, which ``read`` finds out."""
        entry = self._known.get(url)
        if entry is None or entry[:2] != [size, version]:
            entry = self._known[url] = [size, version, read()]
        return str(entry[2])

    def path(self, path: Path) -> str:
        """Digest of a file, or of a folder as the digests of its files by relative name."""
        if path.is_file():
            return self.file(path)
        listing: Mapping[str, str] = {item.relative_to(path).as_posix(): self.file(item) for item in list_files(path)}
        return digest_value(listing)

    def save(self) -> None:
        """Write the memory back."""
        if self._memory is None:
            return
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._memory, json.dumps(self._known))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text or bytes beside ``path``, flush them to the disk, then rename over it.

    Any number may write one path at once, threads and other machines too: the last rename wins, and every moment has a
    whole file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(content.encode("utf-8") if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # its name is never used again
        raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: a rename in it then outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
