"""The files of a model folder, wherever they lie: on a local disk, or in an object store that is read by byte ranges.

A folder in a store is named by its URL (``s3://bucket/model``, any that fsspec knows), or stands as a local folder with
everything but the weights in it and :data:`POINTER`, which says where those are (see ``checkpoint.remote_folder``).
Bytes go from the store into whoever asked for them: no weight file is ever written to a local disk.

Retries, resumed ranges and the refusal of a file that changes are ``data.remote``'s, the same as for data.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from posttrain_lib.data.remote import RemoteObject, file_system, patiently
from posttrain_lib.errors import ModelError, PosttrainError

#: in a local folder: {"url": of the folder with the weights, "files": {name: {"size": bytes, ...its version}}}
POINTER = "weights.remote.json"
#: bytes that are mapped, copied or asked for at once: what loading needs besides the parameters themselves
AT_A_TIME = 8 << 20
#: ranges under way together: with AT_A_TIME as many bytes as data.remote reads ahead at the most
_IN_FLIGHT = 4
#: what tells versions apart by content; where a store has one, times of writing say nothing more
_BY_CONTENT = ("ETag", "etag", "md5Hash", "checksum")
#: files of weights, whatever their format
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
#: file, first byte, last byte + 1
Span = tuple[str, int, int]


class WeightFiles(Protocol):
    """A folder's files by name."""

    def where(self, name: str) -> str:
        """The file as an error names it."""

    def names(self) -> set[str]:
        """Files directly in the folder."""

    def size(self, name: str) -> int:
        """Bytes. ModelError where there is no such file."""

    def buffers(self, spans: Iterable[Span]) -> Iterator[tuple[Any, int]]:
        """(writable buffer, where in it the span begins) of each span, in order. A buffer is there until the next one
        is asked for; nothing may hold on to it then."""


def weight_files(folder: str | Path) -> WeightFiles:
    """The files of a local folder, of the store that its pointer names, or of a store's folder by its URL.

    Raises:
        ModelError: the pointer is broken, or the store cannot be reached.
    """
    if is_remote(folder):
        return StoreFiles(str(folder))
    pointer = Path(folder) / POINTER
    if not pointer.is_file():
        return LocalFiles(Path(folder))
    try:
        content = json.loads(pointer.read_text(encoding="utf-8"))
        return StoreFiles(str(content["url"]), dict(content["files"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "the file that says where the weights are is broken",
            where=pointer,
            got=f"{type(error).__name__}: {error}",
            fix="fetch the folder again",
        ) from error


def is_weights(name: str) -> bool:
    """Whether a file of a model folder is weights, their index, or the pointer to them."""
    return PurePosixPath(name).suffix in WEIGHT_SUFFIXES or name.endswith((".index.json", POINTER))


def is_remote(folder: str | Path) -> bool:
    """Whether the weights are named by a URL. A Path is always local: it would have lost the URL's second slash."""
    return isinstance(folder, str) and "://" in folder


def need_local(folder: str | Path, why: str) -> None:
    """ModelError where a folder's weights lie in a store, for what reads them past this module; ``why``: what does."""
    pointer = Path(folder) / POINTER
    if pointer.is_file():
        raise ModelError(
            "the weights lie in a store, and are needed on a disk",
            where=pointer,
            got=json.loads(pointer.read_text(encoding="utf-8"))["url"],
            expected=f"a local model folder, because {why}",
            fix="copy the folder from the store to a disk, and name that",
        )


def read_bytes(files: WeightFiles, name: str, begin: int, end: int) -> bytes:
    """Bytes ``[begin, end)`` of a file."""
    spans = files.buffers([(name, begin, end)])
    return b"".join(bytes(memoryview(buffer)[first : first + end - begin]) for buffer, first in spans)


def copy_bytes(files: WeightFiles, name: str, begin: int, end: int, out: BinaryIO) -> None:
    """Append bytes ``[begin, end)`` of a file to ``out``, some megabytes at a time; nothing where there are none."""
    starts = range(begin, end, AT_A_TIME)
    spans = [(name, start, min(end, start + AT_A_TIME)) for start in starts]
    for (_, start, stop), (buffer, first) in zip(spans, files.buffers(spans), strict=True):
        with memoryview(buffer) as view:
            out.write(view[first : first + stop - start])


class LocalFiles:
    """Files of a local folder, mapped a span at a time; nothing stays mapped behind one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def where(self, name: str) -> str:
        return str(self._folder / name)

    def names(self) -> set[str]:
        return {path.name for path in self._folder.iterdir() if path.is_file()} if self._folder.is_dir() else set()

    def size(self, name: str) -> int:
        try:
            return (self._folder / name).stat().st_size
        except FileNotFoundError as error:
            raise _missing(self.where(name)) from error

    def buffers(self, spans: Iterable[Span]) -> Iterator[tuple[Any, int]]:
        for name, begin, end in spans:
            page = begin - begin % mmap.ALLOCATIONGRANULARITY
            with open(self._folder / name, "rb") as handle:
                # Private and writable, for torch warns of buffers that it may not write to; nothing writes.
                mapped = mmap.mmap(handle.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
            yield mapped, begin - page
            mapped.close()


class StoreFiles:
    """Files of a store's folder, as they were when they were pinned, or else when each was first looked at.

    Args:
        pins: name -> {"size", ...version}, of every weight file and index.
    """

    def __init__(self, url: str, pins: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._url, self._pins = url.rstrip("/"), pins
        self._objects: dict[str, RemoteObject] = {}
        self._lock = threading.Lock()

    def where(self, name: str) -> str:
        return f"{self._url}/{name}"

    def names(self) -> set[str]:
        if self._pins is not None:
            return set(self._pins)
        return {name for name in files_below(self._url) if "/" not in name}

    def size(self, name: str) -> int:
        size = self._open(name).size
        if size is None:
            raise ModelError("the store does not tell how long the file is", where=self.where(name))
        return size

    def pin(self, name: str) -> dict[str, Any]:
        """{"size", ...version} of a file, as it is in the store.

        Raises:
            ModelError: the store does not tell one version from another.
        """
        version = self._open(name).version
        known = {field: version[field] for field in _BY_CONTENT if field in version} or version
        if not known:
            raise ModelError(
                "the store does not tell one version of the file from another, so a change would go unseen",
                where=self.where(name),
                fix="copy the model to a local disk or an object store",
            )
        return {"size": self.size(name), **known}

    def buffers(self, spans: Iterable[Span]) -> Iterator[tuple[Any, int]]:
        stop = threading.Event()
        asked: deque[Future[bytearray]] = deque()
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="weights") as pool:
            try:
                for name, begin, end in spans:
                    asked.append(pool.submit(self._fetch, name, begin, end, stop))
                    if len(asked) == _IN_FLIGHT:
                        yield asked.popleft().result(), 0
                while asked:
                    yield asked.popleft().result(), 0
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _fetch(self, name: str, begin: int, end: int, stop: threading.Event) -> bytearray:
        file = self._open(name)
        with client_errors(file.url):
            return file.fetch(begin, end, stop)

    def _open(self, name: str) -> RemoteObject:
        with self._lock:
            if name in self._objects:
                return self._objects[name]
        url = self.where(name)
        with client_errors(url):
            found = RemoteObject(url)
        if self._pins is not None:
            _check_pin(url, self._pins.get(name), found)
        with self._lock:
            return self._objects.setdefault(name, found)


def files_below(url: str) -> list[str]:
    """Names relative to a store's folder of all files below it, sorted.

    Raises:
        ModelError: there is none, or the store cannot be read.
    """
    with client_errors(url):
        filesystem, root = file_system(url)
        filesystem.invalidate_cache()
        found = patiently(url, lambda: filesystem.find(root))
    if not found:
        raise ModelError(
            "the model folder does not exist, or is empty",
            where=url,
            fix="name a folder in Hugging Face format; its files lie directly behind the URL",
        )
    base = root.rstrip("/") + "/"
    return sorted(str(name).removeprefix(base) for name in found if not str(name).endswith("/"))


@contextmanager
def client_errors(where: str) -> Iterator[None]:
    """Every file system has a client with exceptions of its own (credentials, connections, names): name the file."""
    try:
        yield
    except PosttrainError:
        raise
    except FileNotFoundError as error:
        raise _missing(where) from error
    except Exception as error:
        raise ModelError(
            "the model cannot be read from its store",
            where=where,
            got=f"{type(error).__name__}: {str(error).strip() or repr(error)}",
            fix="check the URL, the credentials and the access rights",
        ) from error


def _missing(where: str) -> ModelError:
    return ModelError("a file of the model is missing", where=where, fix="fetch the missing file")


def _check_pin(url: str, pin: Mapping[str, Any] | None, found: RemoteObject) -> None:
    if pin is None:
        raise _missing(url)
    now = {"size": found.size, **found.version}
    if any(now.get(field) != value for field, value in pin.items()):
        raise ModelError(
            "a file of the model was replaced in its store since the run began",
            where=url,
            got=", ".join(f"{field} {now.get(field)}" for field in pin),
            expected=", ".join(f"{field} {value}" for field, value in pin.items()),
            fix="start the run again for the new model; publish a new model under a new name",
        )
