"""Folders of checkpoints in an object store, by URL (``s3://bucket/runs/17``, any that fsspec knows).

A store has no rename, so files go to their final names at once and the manifest follows by a single PUT: a folder
without one was never published, is never read, and is removed by the next start. Bytes go from the buffer that the
shards were copied into straight to the store, in parts on S3. Retries are ``data.remote``'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from posttrain_lib.checkpoint.state_files import MANIFEST, WRITE_BYTES, Image, is_step_folder
from posttrain_lib.data.remote import RemoteObject, file_system, patiently, protocols
from posttrain_lib.errors import CheckpointError, DataError

_Result = TypeVar("_Result")

#: S3 takes 10,000 parts of a file
_MOST_PARTS = 9_000
_MIB = 1 << 20


class RemoteFolder:
    """``state_files.CheckpointFolder`` over a store."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._filesystem, self._root = file_system(self._url)

    def prepare(self, name: str) -> None:
        self.remove(name)

    def image(self, name: str, file: str, size: int) -> Image:
        kind = _S3Image if "s3" in protocols(self._filesystem) else _StreamedImage
        return kind(self._filesystem, f"{self._root}/{name}/{file}", size)

    def put(self, name: str, file: str, text: str) -> None:
        path = f"{self._root}/{name}/{file}"
        _write(path, lambda: self._filesystem.pipe_file(path, text.encode("utf-8")))

    def publish(self, name: str, manifest: str) -> None:
        self.put(name, MANIFEST, manifest)

    def names(self) -> list[str]:
        return sorted(name for name, files in self._listing().items() if MANIFEST in files)

    def remove(self, name: str) -> None:
        files = self._listing().get(name, [])
        # The manifest first: half removed, it is no checkpoint any more.
        for file in sorted(files, key=lambda file: file != MANIFEST):
            path = f"{self._root}/{name}/{file}"
            _write(path, partial(_remove, self._filesystem, path))

    def remove_torn(self) -> None:
        for name, files in self._listing().items():
            if MANIFEST not in files:
                self.remove(name)

    def path(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _listing(self) -> dict[str, list[str]]:
        """Checkpoint -> its files, as the store tells now."""
        self._filesystem.invalidate_cache()
        found = patiently(self._url, lambda: self._filesystem.find(self._root))
        listing: dict[str, list[str]] = {}
        for path in found:
            name, _, file = str(path).removeprefix(self._root.rstrip("/") + "/").partition("/")
            if is_step_folder(name) and file:
                listing.setdefault(name, []).append(file)
        return listing


class _S3Image:
    """A file in parts, each tried again by itself; a small one by a single PUT."""

    threads = 8  # as many requests as data.remote reads with

    def __init__(self, filesystem: Any, path: str, size: int) -> None:
        self._filesystem, self._path, self._size = filesystem, path, size
        self._bucket, self._key, _ = filesystem.split_path(path)
        self.block_bytes = max(WRITE_BYTES, -(-size // _MOST_PARTS // _MIB) * _MIB)
        self._parts: dict[int, str] = {}
        self._upload = None if size <= self.block_bytes else self._call("create_multipart_upload")["UploadId"]

    def write(self, begin: int, block: memoryview) -> None:
        body = bytes(block[: self._size - begin])
        if self._upload is None:
            self._call("put_object", Body=body)
            return
        number = begin // self.block_bytes + 1
        self._parts[number] = self._call("upload_part", Body=body, UploadId=self._upload, PartNumber=number)["ETag"]

    def close(self) -> None:
        if self._upload is None:
            return
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(self._parts.items())]
        try:
            self._call("complete_multipart_upload", UploadId=self._upload, MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # NoSuchUpload: the answer to an attempt that had succeeded was lost
            self._filesystem.invalidate_cache()
            if patiently(self._path, lambda: self._filesystem.info(self._path))["size"] != self._size:
                raise

    def abandon(self) -> None:
        if self._upload is not None:
            self._call("abort_multipart_upload", UploadId=self._upload)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        fixed = {"Bucket": self._bucket, "Key": self._key}
        return _write(self._path, lambda: self._filesystem.call_s3(method, **fixed, **arguments))


class _StreamedImage:
    """For stores without parts: the blocks, which stay where they are until the save is over, one behind the other."""

    block_bytes = WRITE_BYTES
    threads = 2

    def __init__(self, filesystem: Any, path: str, size: int) -> None:
        self._filesystem, self._path, self._size = filesystem, path, size
        self._blocks: dict[int, memoryview] = {}

    def write(self, begin: int, block: memoryview) -> None:
        self._blocks[begin] = block[: self._size - begin]

    def close(self) -> None:
        _write(self._path, self._stream)

    def abandon(self) -> None:
        self._blocks.clear()

    def _stream(self) -> None:
        with self._filesystem.open(self._path, "wb", block_size=WRITE_BYTES) as handle:
            for _, block in sorted(self._blocks.items()):
                handle.write(block)


class RemoteFiles:
    """``state_files.CheckpointFiles`` over a store."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._objects: dict[str, RemoteObject] = {}
        self._lock, self._never = threading.Lock(), threading.Event()

    def where(self, file: str) -> str:
        return f"{self._url}/{file}"

    def text(self, file: str) -> str:
        return self._open(file).fetch(0, self.size(file), self._never).decode("utf-8")

    def size(self, file: str) -> int:
        return int(self._open(file).size or 0)

    def read_into(self, file: str, begin: int, buffers: Sequence[memoryview]) -> None:
        end = begin + sum(len(buffer) for buffer in buffers)
        if end > self.size(file):
            raise EOFError(f"{file} ends at byte {self.size(file)}")
        got = memoryview(self._open(file).fetch(begin, end, self._never))
        at = 0
        for buffer in buffers:
            buffer[:] = got[at : at + len(buffer)]
            at += len(buffer)

    def _open(self, file: str) -> RemoteObject:
        with self._lock:
            if file not in self._objects:
                self._objects[file] = RemoteObject(self.where(file))
            return self._objects[file]


def _remove(filesystem: Any, path: str) -> None:
    try:
        filesystem.rm_file(path)
    except FileNotFoundError:  # an attempt whose answer was lost had removed it
        return


def _write(where: str, attempt: Callable[[], _Result]) -> _Result:
    """The attempt's result; transient faults are waited out as readers wait them out.

    Raises:
        CheckpointError: the store kept failing.
    """
    try:
        return patiently(where, attempt)
    except DataError as error:
        raise CheckpointError(
            "the store kept failing while a checkpoint was written", where=where, got=error.got
        ) from error
