"""Folders of checkpoints on a disk: written under another name, renamed when whole; and what both kinds of folder are.

``state_remote`` has the same over an object store.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from posttrain_lib.lineage.digests import sync_folder

MANIFEST, STATE = "manifest.json", "state.json"
#: every write of an image begins and ends at such a boundary, which a disk takes from memory without a copy
PAGE_BYTES = 4096
#: bytes of one write
WRITE_BYTES = 8 << 20
_PARTIAL = ".partial"


def step_folder(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def is_step_folder(name: str) -> bool:
    """Whether a folder is a step's checkpoint; not a copy that somebody made of one, under a name with more in it."""
    return re.fullmatch(r"step-\d{8,}", name) is not None


class Image(Protocol):
    """A file of known size that is being written, by ``threads`` threads at once, in blocks of ``block_bytes``."""

    block_bytes: int
    threads: int

    def write(self, begin: int, block: memoryview) -> None:
        """Put ``block`` at ``begin``, a multiple of ``block_bytes``. The last one may end behind the file, at a page's
        end; the memory stays as it is until the file is closed."""

    def close(self) -> None:
        """All is on the disk or in the store when this returns."""

    def abandon(self) -> None:
        """Give the file up, after an error."""


class CheckpointFiles(Protocol):
    """The files of one checkpoint, for reading."""

    def where(self, file: str) -> str:
        """The file as an error names it."""

    def text(self, file: str) -> str:
        """A small file. FileNotFoundError where there is none."""

    def size(self, file: str) -> int:
        """Bytes. FileNotFoundError where there is none."""

    def read_into(self, file: str, begin: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one behind the other, from byte ``begin`` on; EOFError where the file ends before."""


class CheckpointFolder(Protocol):
    """A folder of checkpoints. Rank 0 alone calls ``prepare``, ``publish``, ``remove`` and ``remove_torn``."""

    def prepare(self, name: str) -> None:
        """Make room for a checkpoint that is about to be written; what is left of an earlier try goes."""

    def image(self, name: str, file: str, size: int) -> Image:
        """A file of the checkpoint that is being written."""

    def put(self, name: str, file: str, text: str) -> None:
        """A small file of it."""

    def publish(self, name: str, manifest: str) -> None:
        """The manifest, last: from here on the checkpoint is there."""

    def names(self) -> list[str]:
        """Checkpoints, oldest first, whole or damaged."""

    def remove(self, name: str) -> None:
        """A checkpoint; half removed, it is no longer one."""

    def remove_torn(self) -> None:
        """What was never published."""

    def path(self, name: str) -> str | Path:
        """Where it stands."""


class LocalFolder:
    """:class:`CheckpointFolder` on a disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self, name: str) -> None:
        partial = self._partial(name)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    def image(self, name: str, file: str, size: int) -> Image:
        return _LocalImage(self._partial(name) / file, size)

    def put(self, name: str, file: str, text: str) -> None:
        with open(self._partial(name) / file, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())

    def publish(self, name: str, manifest: str) -> None:
        """A manifest on the disk means files on the disk: they were flushed before; then one rename."""
        partial = self._partial(name)
        self.put(name, MANIFEST, manifest)
        sync_folder(partial)
        if self.path(name).exists():  # a damaged one that was passed over when this run resumed
            self.remove(name)
        os.rename(partial, self.path(name))
        sync_folder(self._folder)

    def names(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("step-*") if is_step_folder(path.name))

    def remove(self, name: str) -> None:
        doomed = self._folder / f".{name}.doomed{_PARTIAL}"
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(self.path(name), doomed)  # at once: a half removed checkpoint must not look like one
        shutil.rmtree(doomed)

    def remove_torn(self) -> None:
        for leftover in self._folder.glob(f".step-*{_PARTIAL}"):
            shutil.rmtree(leftover)

    def path(self, name: str) -> Path:
        return self._folder / name

    def _partial(self, name: str) -> Path:
        return self._folder / f".{name}{_PARTIAL}"


class _LocalImage:
    """Past the page cache where the file system can: half the memory traffic, and nothing of the training's own pages
    is pushed out of the cache by a file that nobody may ever read."""

    block_bytes = WRITE_BYTES
    threads = 4

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._handle = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError:  # tmpfs and some network file systems; if it is anything else, this says so
            self._handle = os.open(path, flags, 0o666)

    def write(self, begin: int, block: memoryview) -> None:
        while len(block):
            try:
                count = os.pwrite(self._handle, block, begin)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct():
                    raise
                # some file systems take the flag and then refuse the write
                fcntl.fcntl(self._handle, fcntl.F_SETFL, fcntl.fcntl(self._handle, fcntl.F_GETFL) & ~os.O_DIRECT)
                continue
            count -= 0 if count == len(block) else count % PAGE_BYTES  # a short write goes on from a page
            if count <= 0:
                raise OSError(f"the disk took nothing at byte {begin}")
            begin, block = begin + count, block[count:]

    def close(self) -> None:
        try:
            os.ftruncate(self._handle, self._size)  # blocks are whole pages
            os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def abandon(self) -> None:
        os.close(self._handle)

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._handle, fcntl.F_GETFL) & os.O_DIRECT)


class LocalFiles:
    """:class:`CheckpointFiles` on a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def where(self, file: str) -> str:
        return str(self._path / file)

    def text(self, file: str) -> str:
        return (self._path / file).read_text(encoding="utf-8")

    def size(self, file: str) -> int:
        return (self._path / file).stat().st_size

    def read_into(self, file: str, begin: int, buffers: Sequence[memoryview]) -> None:
        handle = os.open(self._path / file, os.O_RDONLY)
        try:
            for buffer in buffers:
                while len(buffer):
                    count = os.preadv(handle, [buffer], begin)
                    if not count:
                        raise EOFError(f"{file} ends at byte {begin}")
                    begin, buffer = begin + count, buffer[count:]
        finally:
            os.close(handle)


def checkpoint_folder(folder: str | Path) -> CheckpointFolder:
    """By path or URL."""
    if isinstance(folder, str) and "://" in folder:
        from posttrain_lib.checkpoint.state_remote import RemoteFolder

        return RemoteFolder(folder)
    return LocalFolder(Path(folder))


def checkpoint_files(path: str | Path) -> CheckpointFiles:
    """By path or URL."""
    if isinstance(path, str) and "://" in path:
        from posttrain_lib.checkpoint.state_remote import RemoteFiles

        return RemoteFiles(path)
    return LocalFiles(Path(path))
