"""Bytes of remote files: ranges fetched ahead in parallel, faults outlasted, one version of a file throughout.

Works on every fsspec file system. On S3 each range asks for the version that was there at the start (``If-Match``) and
goes on where a cut body ended; elsewhere the store is asked for the file's version again after each range.
"""

from __future__ import annotations

import errno
import io
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync

from posttrain_lib.errors import DataError

_Result = TypeVar("_Result")

#: by which remote stores tell one version of a file from another
VERSION_FIELDS = (
    "ETag",
    "etag",
    "VersionId",
    "md5Hash",
    "checksum",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
    "blob_id",  # of the Hugging Face hub: git's digest of the content
)

_FIRST_RANGE = 1 << 18
_IN_FLIGHT = 8
#: bytes asked for before the reader needs them. What keeps a link busy is rate x latency: it doubles for a reader that
#: has to wait, as long as that brings more bytes per second (300 MB/s x 0.1 s at the most). More would come in bursts,
#: and a reader that never waits needs none, nor do hundreds of them.
_FIRST_AHEAD = 2 << 20
_WORTH_DOUBLING = 1.25
_LARGEST_AHEAD = 32 << 20
_MOST_STREAMS = 64
_PIECE = 1 << 18
#: below this a range is taken for stalled, where only its whole time can be watched
_SLOWEST_BYTES_PER_SECOND = 1 << 16


@dataclass(frozen=True)
class Patience:
    """How long a store may misbehave; an attempt that brought bytes starts the count again."""

    attempts: int = 8
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 10.0
    stall_seconds: float = 15.0

    def wait_seconds(self, failures: int) -> float:
        """Doubling, with jitter: readers that failed together do not come back together."""
        longest = min(self.first_wait_seconds * 2.0 ** (failures - 1), self.longest_wait_seconds)
        return longest * _JITTER.uniform(0.5, 1.0)


PATIENCE = Patience()
#: its own generator: the process's random state belongs to others
_JITTER = random.Random()

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_TRANSIENT_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,  # s3fs: SlowDown
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.EREMOTEIO,  # s3fs: InternalError
    errno.ETIMEDOUT,
}
#: clients' connection errors that are no OSErrors, by name: none of the clients is imported here
_TRANSIENT_NAMES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "NetworkError",  # httpx
    "ProtocolError",
    "ResponseParserError",
    "TimeoutException",  # httpx
}
_CHANGED_NAMES = {"FileExpired"}


def file_system(url: str) -> tuple[Any, str]:
    """(file system, path on it). S3's clients get the timeouts of :data:`PATIENCE` and no retries besides ours."""
    if not url.startswith(("s3://", "s3a://")):
        return fsspec.core.url_to_fs(url)
    configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    config = {
        "connect_timeout": PATIENCE.stall_seconds,
        "read_timeout": PATIENCE.stall_seconds,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "max_pool_connections": 8 * _IN_FLIGHT,
        **configured,
    }
    filesystem, path = fsspec.core.url_to_fs(url, config_kwargs=config)
    # Two layers that each retry would multiply: one policy, here, for every client.
    filesystem.retries = 1
    return filesystem, path


def protocols(filesystem: Any) -> tuple[str, ...]:
    """The names under which fsspec knows the file system."""
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


def version_of(told: dict[str, Any]) -> dict[str, str]:
    """What a store's answer tells of a file's version; empty where it tells nothing."""
    return {name: str(told[name]) for name in VERSION_FIELDS if told.get(name)}


def patiently(where: str, attempt: Callable[[], _Result], stop: threading.Event | None = None) -> _Result:
    """The attempt's result; transient faults are waited out.

    Raises:
        DataError: the store kept failing for all attempts of :data:`PATIENCE`. A permanent fault is raised as it is.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except Exception as error:
            failures += 1
            _wait_or_give_up(where, error, failures, stop or threading.Event())


def _wait_or_give_up(where: str, error: Exception, failures: int, stop: threading.Event) -> None:
    if not is_transient(error):
        raise error
    if failures >= PATIENCE.attempts or stop.wait(PATIENCE.wait_seconds(failures)):
        raise DataError(
            "the data cannot be read: the store kept failing",
            where=where,
            got=f"{type(error).__name__}: {str(error).strip() or repr(error)} ({failures} attempts without a byte)",
            fix="run again when the store answers; what was finished is reused",
        ) from error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later. A status that the server sent decides before the exception's type."""
    status = _status(error) or _status(error.__cause__)
    if status is not None and status != 400:  # S3 reports some timeouts as 400
        return status in _TRANSIENT_STATUS
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__)


def _status(error: BaseException | None) -> int | None:
    """HTTP status in an exception of botocore, aiohttp, requests, httpx, gcsfs or azure."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        named = [getattr(error, name, None) for name in ("status", "status_code", "code")]
        found = next((value for value in (*named, getattr(response, "status_code", None)) if value is not None), None)
    return int(found) if isinstance(found, int) or (isinstance(found, str) and found.isdigit()) else None


class RemoteObject:
    """One version of one file: size, and any range of its bytes.

    Raises:
        DataError: the store keeps failing, or the file was replaced since this object was made.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem, self._path = file_system(url)
        self._is_s3 = "s3" in protocols(self._filesystem)
        told = patiently(url, self._ask)
        self._version = version_of(told)
        #: bytes; None where the store does not say
        self.size: int | None = told.get("size")

    @property
    def version(self) -> dict[str, str]:
        """What the store tells of this version: an etag, a time; empty where it tells nothing."""
        return dict(self._version)

    def fetch(self, start: int, end: int, stop: threading.Event) -> bytearray:
        """Bytes ``[start, end)``; what arrived before a fault is kept and only the rest asked for again."""
        got = bytearray()
        failures = 0
        while len(got) < end - start:
            before = len(got)
            try:
                self._receive(start + before, end, got)
            except Exception as error:
                if self._says_changed(error):
                    raise self._changed() from error
                failures = failures + 1 if len(got) == before else 1
                _wait_or_give_up(self.url, error, failures, stop)
        return got

    def _ask(self) -> dict[str, Any]:
        """The store's own word, not a listing remembered from before."""
        if self._is_s3:
            return self._filesystem.info(self._path, refresh=True)
        self._filesystem.invalidate_cache()
        return self._filesystem.info(self._path)

    def _receive(self, start: int, end: int, got: bytearray) -> None:
        if self._is_s3:
            sync(self._filesystem.loop, self._stream_s3, start, end, got)
            return
        if self._filesystem.async_impl:
            limit = PATIENCE.stall_seconds + (end - start) / _SLOWEST_BYTES_PER_SECOND
            fetch = self._filesystem._cat_file
            data = sync(self._filesystem.loop, fetch, self._path, start=start, end=end, timeout=limit)
        else:
            data = self._filesystem.cat_file(self._path, start=start, end=end)
        if self._version and version_of(self._ask()) != self._version:
            raise self._changed()
        if len(data) != end - start:
            raise ConnectionError(f"{len(data)} bytes came of {end - start} asked for")
        got += data

    async def _stream_s3(self, start: int, end: int, got: bytearray) -> None:
        filesystem, etag = self._filesystem, self._version.get("ETag")
        bucket, key, version = filesystem.split_path(self._path)
        asked = {"IfMatch": etag} if etag else {}
        if version:
            asked["VersionId"] = version
        answer = await filesystem._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **asked, **filesystem.req_kw
        )
        body = answer["Body"]
        try:
            if etag and answer.get("ETag") != etag:
                raise self._changed()
            if not str(answer.get("ContentRange")).startswith(f"bytes {start}-"):
                raise DataError(
                    "the store does not serve byte ranges",
                    where=self.url,
                    got=f"Content-Range: {answer.get('ContentRange')}",
                    expected=f"bytes {start}-{end - 1}/{self.size}",
                    fix="copy the file to a local disk or an object store",
                )
            missing = end - start
            while missing:
                piece = await body.read(min(_PIECE, missing))
                if not piece:
                    raise ConnectionError(f"the body ended {missing} bytes early")
                got += piece
                missing -= len(piece)
        finally:
            body.close()

    def _says_changed(self, error: BaseException) -> bool:
        return type(error).__name__ in _CHANGED_NAMES or 412 in (_status(error), _status(error.__cause__))

    def _changed(self) -> DataError:
        return DataError(
            "the file was replaced while it was read",
            where=self.url,
            expected=", ".join(f"{name} {value}" for name, value in self._version.items()),
            fix="run again; write new data under a new name, so that no run reads half of each",
        )


@dataclass
class _Part:
    start: int
    end: int
    data: Future[bytearray]


class _Stream:
    """Consecutive parts of ``[start, end)``, asked for ahead of their reader."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.parts: deque[_Part] = deque()
        #: where the next part starts, how far the reader is
        self.next, self.high = start, start
        #: parts from here on are kept, because they are read in any order
        self.held: int | None = None

    def covers(self, position: int) -> bool:
        first = self.parts[0].start if self.parts else self.next
        return first <= position < self.end and position <= self.next

    def drop_before(self, position: int) -> None:
        while self.parts and self.parts[0].end <= position:
            self.parts.popleft()


class RemoteFile(io.RawIOBase):
    """A remote file, for reading: sequential from wherever a reader seeks to, several such places at once.

    Holds at most the bytes ahead of its readers (36 MiB for all together, one part for each) and what :meth:`hold`
    names. Threads stop when it is closed.
    """

    def __init__(self, source: RemoteObject) -> None:
        super().__init__()
        assert source.size is not None
        self._object, self._size, self._position = source, source.size, 0
        self._ahead = _FIRST_AHEAD
        #: bytes taken since the last look at the rate, when that was, and the rate at the last doubling
        self._taken, self._looked, self._rate = 0, time.monotonic(), 0.0
        self._streams: list[_Stream] = []  # the last used last
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="ranges")

    def hold(self, start: int, end: int) -> None:
        """``[start, end)`` will be read in any order, what lies before it not again: it stays in memory whole."""
        stream = self._stream_at(start)
        self._streams = [stream]
        stream.held = start
        stream.drop_before(start)
        self._ask_ahead(stream, end)

    def follow(self, spans: list[tuple[int, int]]) -> None:
        """Each span will be read from start to end, in turns with the others; nothing else will."""
        self._streams = [_Stream(start, end) for start, end in spans]
        for stream in self._streams:
            self._ask_ahead(stream, stream.next + 1)

    def readinto(self, buffer: Any) -> int:
        """What is there at the position, waiting for its first byte only."""
        view = memoryview(buffer).cast("B")
        if self._position >= self._size or not view:
            return 0
        stream = self._stream_at(self._position)
        stream.high = max(stream.high, self._position)
        if stream.held is None:
            stream.drop_before(self._position)
        self._ask_ahead(stream, self._position + 1)
        part = next(part for part in stream.parts if part.end > self._position)
        if self._taken >= self._ahead and not part.data.done():
            self._look_at_rate()
            self._ask_ahead(stream, self._position + 1)
        data = part.data.result()
        offset = self._position - part.start
        count = min(len(view), len(data) - offset)
        view[:count] = memoryview(data)[offset : offset + count]
        self._position += count
        self._taken += count
        return count

    def read(self, size: int | None = -1) -> bytes:
        """``size`` bytes, fewer at the end of the file only."""
        left = self._size - self._position
        result = bytearray(max(0, left if size is None or size < 0 else min(size, left)))
        done = 0
        while done < len(result):
            done += self.readinto(memoryview(result)[done:])
        return bytes(result)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._stop.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._streams.clear()
        super().close()

    def _look_at_rate(self) -> None:
        now = time.monotonic()
        rate = self._taken / max(now - self._looked, 1e-6)
        if rate > _WORTH_DOUBLING * self._rate and self._ahead < _LARGEST_AHEAD:
            self._ahead *= 2
            self._rate = rate
        self._taken, self._looked = 0, now

    def _stream_at(self, position: int) -> _Stream:
        found = next((stream for stream in self._streams if stream.covers(position)), None)
        if found is None:
            found = _Stream(position, self._size)
            self._streams = self._streams[1 - _MOST_STREAMS :]
        else:
            self._streams.remove(found)
        self._streams.append(found)
        return found

    def _ask_ahead(self, stream: _Stream, needed: int) -> None:
        """Ask for parts up to ``needed``, and on until enough is under way for the reader not to wait."""
        ahead = self._ahead // len(self._streams)
        # So many parts that one is always under way while the reader waits for another.
        length = max(_FIRST_RANGE, ahead // _IN_FLIGHT)
        while stream.next < min(max(needed, stream.high + ahead), stream.end):
            start, end = stream.next, min(stream.next + length, stream.end)
            stream.parts.append(_Part(start, end, self._pool.submit(self._object.fetch, start, end, self._stop)))
            stream.next = end
