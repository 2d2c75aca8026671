"""A Hugging Face hub on loopback: as much of its HTTP API as ``huggingface_hub`` and ``datasets`` ask for, and faults.

Data sets and models with commits, branches, tags and ``refs/pr``: repository info, trees (in pages), paths-info,
auth-check, and ``resolve`` as the hub answers it: small files by a redirect on the hub, large ones (parquet,
safetensors) by a redirect to a storage host, which tells their size and ETag in ``X-Linked-*`` and must never see a
token. Missing and private look alike to who has no token. No Xet storage, no Dataset Viewer, nothing that writes.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.support.faulty_proxy import Fault

#: what the owner of a gated repository gave access
GRANTED = "hf_granted"
_STORED_ELSEWHERE = (".parquet", ".safetensors", ".bin", ".gz", ".zst")
_API = re.compile(
    r"/api/(?P<kind>datasets|models)/(?P<name>[^/]+/[^/]+)"
    r"(/(?P<what>revision|tree|paths-info|auth-check)(/(?P<revision>[^/]+)(/(?P<path>.+))?)?)?"
)
_RESOLVE = re.compile(r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_CACHED = re.compile(
    r"/api/resolve-cache/(?P<kind>datasets|models)/(?P<name>[^/]+/[^/]+)/(?P<commit>\w{40})/(?P<path>.+)"
)
_STORED = re.compile(r"/storage/(?P<digest>\w{64})")
_TEXTS = {"RepoNotFound": "Repository not found", "GatedRepo": "Access to this repository is restricted"}


@dataclass
class Repository:
    """Every commit's files, and where branches, tags and pull requests stand."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit_of(self, revision: str) -> str | None:
        """Full commit that a branch, a tag, a pull request or a commit names."""
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass(frozen=True)
class Asked:
    """One request and its answer. ``start`` is where its range begins, None where it asked for none."""

    method: str
    path: str
    start: int | None
    status: int
    has_token: bool


@dataclass
class Answer:
    """What goes back; ``whole`` says that a body of which no range was asked is all of the file."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def of(cls, content: Any, **headers: str) -> Answer:
        """JSON."""
        return cls(200, {"Content-Type": "application/json", **headers}, json.dumps(content).encode())

    @classmethod
    def failed(cls, status: int, code: str) -> Answer:
        """A refusal as the hub words it: a code for the client, a text for people."""
        text = _TEXTS.get(code, code)
        headers = {"X-Error-Code": code, "X-Error-Message": text, "Content-Type": "application/json"}
        return cls(status, headers, json.dumps({"error": text}).encode())


@dataclass
class Hub:
    """Repositories and faults (change them at any time), and what was asked."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    #: each for so many requests whose path contains its ``key``; 429 and 503 name no time to wait
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    #: paths asked for that this server does not know
    unknown: list[str] = field(default_factory=list)
    #: entries of a tree in one answer
    page: int = 1000
    url: str = ""
    #: the same server under the name of another host
    storage_url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self._stored: dict[str, bytes] = {}

    def commit(self, kind: str, name: str, files: Mapping[str, bytes | str] | Path, ref: str = "main") -> str:
        """Commit exactly these files (or those of a folder) to a branch, a tag or ``refs/pr/N``; returns the commit."""
        if isinstance(files, Path):
            found = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        else:
            found = {path: body.encode() if isinstance(body, str) else body for path, body in files.items()}
        repository = self.repositories.setdefault((kind, name), Repository())
        told = json.dumps([name, ref, len(repository.commits), {path: _sha256(body) for path, body in found.items()}])
        commit = hashlib.sha1(told.encode()).hexdigest()
        repository.commits[commit], repository.refs[ref] = found, commit
        for path, body in found.items():
            if path.endswith(_STORED_ELSEWHERE):
                self._stored[_sha256(body)] = body
        return commit

    def paths(self, part: str = "", method: str = "") -> list[str]:
        """Paths asked for that contain ``part``, in order."""
        return [one.path for one in self.asked if part in one.path and method in one.method]

    def take_fault(self, method: str, path: str, start: int) -> Fault | None:
        """The first fault that applies; it has then happened once more."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.key in path and start >= fault.from_byte:
                    fault.times -= 1
                    return fault
        return None

    def answer(self, path: str, query: dict[str, list[str]], form: dict[str, list[str]], token: str) -> Answer:
        """What the hub says to a request for a path that is still percent-encoded."""
        if found := _STORED.fullmatch(path):
            body = self._stored.get(found["digest"])
            return (
                Answer.failed(404, "EntryNotFound")
                if body is None
                else Answer(200, {"ETag": f'"{_sha256(body)}"'}, body)
            )
        if found := _CACHED.fullmatch(path):
            files = self.repositories[found["kind"], unquote(found["name"])].commits[found["commit"]]
            body = files[unquote(found["path"])]
            return Answer(200, {"ETag": f'"{_git_id(body)}"', "X-Repo-Commit": found["commit"]}, body)
        found = _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        if found is None:
            self.unknown.append(path)
            return Answer.failed(404, "NotFound")
        kind, name = found["kind"] or "models", unquote(found["name"])
        repository = self.repositories.get((kind, name))
        if repository is None:
            return Answer.failed(404 if token else 401, "RepoNotFound")
        asks_files = "/resolve/" in path or found["what"] == "auth-check"
        if repository.gated and asks_files and token != GRANTED:
            return Answer.failed(403 if token else 401, "GatedRepo")
        commit = repository.commit_of(unquote(found["revision"] or "main"))
        if commit is None:
            return Answer.failed(404, "RevisionNotFound")
        files, inside = repository.commits[commit], unquote(found["path"] or "")
        if "/resolve/" in path:
            return self._resolve(f"{kind}/{name}", commit, files, inside)
        if found["what"] == "tree":
            return self._tree(path, files, inside, query)
        if found["what"] == "paths-info":
            told = _entries(files)
            return Answer.of([told[path] for path in form.get("paths", []) if path in told])
        return Answer.of(_info(name, commit, files, repository.gated))

    def _resolve(self, repository: str, commit: str, files: dict[str, bytes], inside: str) -> Answer:
        if inside not in files:
            missing = Answer.failed(404, "EntryNotFound")
            missing.headers["X-Repo-Commit"] = commit
            return missing
        body, headers = files[inside], {"X-Repo-Commit": commit, "X-Linked-Size": str(len(files[inside]))}
        if inside.endswith(_STORED_ELSEWHERE):
            digest = _sha256(body)
            headers |= {"X-Linked-ETag": f'"{digest}"', "Location": f"{self.storage_url}/storage/{digest}"}
            return Answer(302, headers)
        headers |= {"X-Linked-ETag": f'"{_git_id(body)}"'}
        return Answer(307, {**headers, "Location": f"/api/resolve-cache/{repository}/{commit}/{inside}"})

    def _tree(self, path: str, files: dict[str, bytes], inside: str, query: dict[str, list[str]]) -> Answer:
        start = f"{inside}/" if inside else ""
        deep = query.get("recursive") == ["true"]
        below = [
            told
            for entry, told in _entries(files).items()
            if entry.startswith(start) and (deep or "/" not in entry.removeprefix(start))
        ]
        if inside and not below:
            return Answer.failed(404, "EntryNotFound")
        first = int(query.get("cursor", ["0"])[0])
        more = {}
        if first + self.page < len(below):
            next_page = f"{self.url}{path}?recursive={str(deep).lower()}&cursor={first + self.page}"
            more = {"Link": f'<{next_page}>; rel="next"'}
        return Answer.of(below[first : first + self.page], **more)


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _git_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _entries(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Path -> what a tree tells of it, folders before what is in them."""
    told: dict[str, dict[str, Any]] = {}
    for path, body in sorted(files.items()):
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            told.setdefault(folder, {"type": "directory", "oid": _git_id(folder.encode()), "size": 0, "path": folder})
        told[path] = {"type": "file", "oid": _git_id(body), "size": len(body), "path": path}
        if path.endswith(_STORED_ELSEWHERE):
            told[path]["lfs"] = {"oid": _sha256(body), "size": len(body), "pointerSize": 134}
    return told


def _info(name: str, commit: str, files: dict[str, bytes], gated: bool) -> dict[str, Any]:
    return {
        "_id": hashlib.sha1(name.encode()).hexdigest()[:24],
        "id": name,
        "sha": commit,
        "private": False,
        "gated": "manual" if gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in sorted(files)],
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: what was asked is in ``hub.asked``."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(span[1]) if span else None
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        fault = self.hub.take_fault(self.command, url.path, start or 0)
        if fault is not None and fault.status is not None:
            answer = Answer.failed(fault.status, "Injected")
        else:
            answer = self.hub.answer(url.path, parse_qs(url.query), form, token)
        if span and answer.status == 200:
            whole, end = answer.body, min(int(span[2] or len(answer.body)) + 1, len(answer.body))
            answer.status, answer.body = 206, whole[int(span[1]) : end]
            answer.headers["Content-Range"] = f"bytes {span[1]}-{end - 1}/{len(whole)}"
        with self.hub.lock:
            self.hub.asked.append(Asked(self.command, unquote(url.path), start, answer.status, bool(token)))
        self._send(answer, fault)

    do_HEAD = do_POST = do_GET

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = fault is not None and fault.status is None
        try:
            self.wfile.write(answer.body[: fault.after_bytes] if cut and fault is not None else answer.body)
        except ConnectionError:  # the reader has enough
            self.close_connection = True
            return
        if cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A running hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    port = server.server_address[1]
    hub.url, hub.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(hub: Hub, home: Path) -> dict[str, str]:
    """Environment variables by which a new process finds the hub, its caches below ``home``."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # asks a host outside
    }


@contextmanager
def hub_in_process(hub: Hub, home: Path) -> Iterator[None]:
    """The same for this process, whose clients read the environment long ago; they do not wait between attempts."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    no_waits = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})

    def forget() -> None:
        huggingface_hub.HfFileSystem.clear_instance_cache()
        huggingface_hub.close_session()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"})
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", home / "datasets" / "downloads")
        patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        for module in (huggingface_hub.utils._http, huggingface_hub.file_download, datasets.utils.file_utils):
            patch.setattr(module, "time", no_waits)
        forget()
        yield
        forget()
