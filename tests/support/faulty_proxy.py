"""An HTTP proxy on loopback that stands before an object store's server and does what networks do.

Latency before each answer, a bandwidth that all connections share, and faults, each for so many requests of a key: an
error status, a body cut after so many bytes, a body that stalls; of a write, that it happens and its answer is lost.
What was asked for is kept.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_PIECE = 1 << 16
_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Fault:
    """One thing that goes wrong, ``times`` times, with requests for a key that contains ``key``."""

    times: int
    #: answer with this status instead of asking the store; else the body is cut or stalls
    status: int | None = None
    #: bytes of the body that still arrive
    after_bytes: int = 0
    #: instead of closing the connection, keep it open and send nothing
    stall: bool = False
    method: str = "GET"
    key: str = ""
    #: only ranges that start here or later
    from_byte: int = 0


@dataclass(frozen=True)
class Seen:
    """One request: ``[start, end)`` is the range it asked for, None where it asked for none."""

    method: str
    key: str
    start: int | None
    end: int | None


@dataclass
class FaultyProxy:
    """Settings (change them at any time), and what was seen."""

    upstream: str
    latency_seconds: float = 0.0
    bytes_per_second: float | None = None
    #: keep whole objects here after the first request: a test server may copy the whole object for each range of it
    remember: bool = False
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    #: bytes of bodies sent, by key
    sent: dict[str, int] = field(default_factory=dict)
    #: ranges that were under way together, at the most
    most_at_once: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._free_at, self._under_way = 0.0, 0
        self._objects: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}

    def reset(self) -> None:
        """Forget what was seen, faults and settings."""
        with self.lock:
            self.faults.clear()
            self.seen.clear()
            self.sent.clear()
            self._objects.clear()
        self.latency_seconds, self.bytes_per_second, self.remember, self.most_at_once = 0.0, None, False, 0

    def ranges(self, key: str) -> list[tuple[int, int]]:
        """Ranges asked for of objects whose key contains ``key``."""
        return [
            (item.start, item.end)
            for item in self.seen
            if key in item.key and item.start is not None and item.end is not None
        ]

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Counts a range as long as it lasts."""
        with self.lock:
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            yield
        finally:
            with self.lock:
                self._under_way -= 1

    def take_fault(self, method: str, key: str, start: int) -> Fault | None:
        """The first fault that applies; it has then happened once more."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.key in key and start >= fault.from_byte:
                    fault.times -= 1
                    return fault
        return None

    def pace(self, count: int) -> None:
        """Wait for this many bytes' turn on the shared link."""
        if self.bytes_per_second is None:
            return
        with self.lock:
            turn = self._free_at = max(time.monotonic(), self._free_at) + count / self.bytes_per_second
        time.sleep(max(0.0, turn - time.monotonic()))

    def ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None = None
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """The store's answer."""
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc)
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def ask_remembered(
        self, path: str, headers: dict[str, str], span: tuple[int, int]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """A range of an object that is kept here whole."""
        if path not in self._objects:
            whole = self.ask("GET", path, {k: v for k, v in headers.items() if k.lower() != "range"})
            if whole[0] != 200:
                return whole
            self._objects[path] = whole
        _, found, body = self._objects[path]
        start, end = span[0], min(span[1], len(body))
        kept = [(name, value) for name, value in found if name.lower() not in ("content-length", "content-range")]
        extra = [("Content-Length", str(end - start)), ("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")]
        return 206, kept + extra, body[start:end]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: what was asked is in ``proxy.seen``."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # a client that was killed
            self.close_connection = True

    def do_GET(self) -> None:
        proxy, key = self.proxy, unquote(urlsplit(self.path).path).lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = (int(asked[1]), int(asked[2]) + 1) if asked else None
        with proxy.lock:
            proxy.seen.append(Seen(self.command, key, *(span or (None, None))))
        if span is None:
            self._answer(proxy, key, None)
            return
        with proxy.under_way():
            self._answer(proxy, key, span)

    def _answer(self, proxy: FaultyProxy, key: str, span: tuple[int, int] | None) -> None:
        proxy.closing.wait(proxy.latency_seconds)
        fault = proxy.take_fault(self.command, key, span[0] if span else 0)
        if fault is not None and fault.status is not None:
            self._fail(fault.status)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if proxy.remember and span and self.command == "GET":
            answer = proxy.ask_remembered(self.path, headers, span)
        else:
            answer = proxy.ask(self.command, self.path, headers)
        self._send(key, answer, fault)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        proxy, key = self.proxy, unquote(urlsplit(self.path).path).lstrip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with proxy.lock:
            proxy.seen.append(Seen(self.command, key, None, None))
        fault = proxy.take_fault(self.command, f"{key}?{urlsplit(self.path).query}", 0)
        if fault is not None and fault.status is not None:
            self._fail(fault.status)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        try:
            answer = proxy.ask(self.command, self.path, headers, body)
        except ConnectionError:  # of the server itself; the client finds out as it would without a proxy
            self.close_connection = True
            return
        if fault is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._send(key, answer, None)

    def do_POST(self) -> None:
        self.do_PUT()

    def do_DELETE(self) -> None:
        self.do_PUT()

    def _fail(self, status: int) -> None:
        code = _CODES[status]
        body = f"<Error><Code>{code}</Code><Message>injected {code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(self, key: str, answer: tuple[int, list[tuple[str, str]], bytes], fault: Fault | None) -> None:
        status, headers, body = answer
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("connection", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        if "content-length" not in {name.lower() for name, _ in headers}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        whole = len(body) if fault is None else min(fault.after_bytes, len(body))
        view = memoryview(body)
        try:
            for start in range(0, whole, _PIECE):
                piece = view[start : min(start + _PIECE, whole)]
                self.proxy.pace(len(piece))
                self.wfile.write(piece)
                with self.proxy.lock:
                    self.proxy.sent[key] = self.proxy.sent.get(key, 0) + len(piece)
        except ConnectionError:  # the reader has enough
            self.close_connection = True
            return
        if fault is not None:
            if fault.stall:
                self.proxy.closing.wait()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A running proxy before ``upstream`` (``http://host:port``); ``url`` is its own address."""
    proxy = FaultyProxy(upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        proxy.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
