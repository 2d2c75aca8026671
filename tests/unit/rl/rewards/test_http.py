"""A scorer over HTTP, from a real server that has its moods."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from posttrain_lib.errors import DataError
from posttrain_lib.rl.rewards.base import RewardSpec, Verdict
from posttrain_lib.rl.rewards.http import Http
from posttrain_lib.rl.rewards.pool import GraderPool
from tests.support.graders import answer


class Scorer(http.server.BaseHTTPRequestHandler):
    """Answers with what ``server.replies`` has next: (status, body), bytes as they are, or an event to wait for."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((asked, dict(self.headers)))  # type: ignore[attr-defined]
        reply = self.server.replies.pop(0)  # type: ignore[attr-defined]
        if isinstance(reply, threading.Event):
            reply.wait()
            return
        if isinstance(reply, bytes):
            self.wfile.write(reply)
            self.close_connection = True
            return
        status, body = reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Who follows a redirection has forgotten what to ask."""
        self.server.replies.append("got")  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b'{"reward": 1}')

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    made: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    made.replies, made.asked = [], []
    made.url = f"http://127.0.0.1:{made.server_port}/score"
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_what_is_asked_and_taken(server: Any) -> None:
    server.replies += [(200, b'{"reward": 0.25}'), (200, b'{"reward": 1, "correct": true, "more": []}')]
    grade = Http(server.url, headers={"Authorization": "Bearer x"})
    assert grade(answer("text", "wanted", level=3)) == Verdict(0.25)
    assert grade(answer("text")) == Verdict(1, True)
    asked, headers = server.asked[0]
    assert asked == {
        "prompt": [{"role": "user", "content": "Well?"}],
        "text": "text",
        "expected": "wanted",
        "extra": {"level": 3},
    }
    assert headers["Authorization"] == "Bearer x" and headers["Content-Type"] == "application/json"


def test_passing_faults_are_tried_again(server: Any) -> None:
    server.replies += [(503, b""), (429, b""), (200, b'{"reward": 2}')]
    assert Http(server.url, wait_seconds=0.01)(answer("a")) == Verdict(2)


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"nonsense\r\n\r\n",
        b'HTTP/1.0 200 OK\r\nContent-Length: 15\r\n\r\n{"reward": 2',
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{"reward"',
    ],
)
def test_a_reply_that_breaks_off_is_asked_for_again(server: Any, broken: bytes) -> None:
    server.replies += [broken, (200, b'{"reward": 2}')]
    assert Http(server.url, wait_seconds=0.01)(answer("a")) == Verdict(2)
    server.replies += [broken] * 2
    with pytest.raises(DataError, match="after 2 attempts"):
        Http(server.url, retries=1, wait_seconds=0.01)(answer("a"))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed(server: Any, status: int) -> None:
    server.replies += [f"HTTP/1.0 {status} X\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n".encode()]
    with pytest.raises(DataError, match=f"{status}.* after 1 attempts"):
        Http(server.url)(answer("a"))
    assert server.replies == []


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        ([(503, b"")] * 3, "after 3 attempts"),
        ([(404, b"")], "404.* after 1 attempts"),
        ([(200, b"[1]")], "has no reward"),
        ([(200, b"{}")], "has no reward"),
        ([(200, b"one")], "no JSON"),
        ([(200, b"x" * (2 << 20))], "too long"),
    ],
)
def test_scorers_that_fail(server: Any, replies: list, words: str) -> None:
    server.replies += replies
    with pytest.raises(DataError, match=f"(?s){words}"):
        Http(server.url, retries=2, wait_seconds=0.01)(answer("a"))
    assert server.replies == []


def test_nobody_there(server: Any) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DataError, match="refused"):
        Http(f"http://127.0.0.1:{port}/", retries=1, wait_seconds=0.01)(answer("a"))


def test_a_scorer_that_lies_or_hangs_costs_its_answer(server: Any) -> None:
    silence = threading.Event()
    server.replies += [(200, b'{"reward": NaN}'), (200, b'{"reward": "1"}'), silence, (200, b'{"reward": 1.5}')]
    options = {"url": server.url, "retries": 0, "timeout_seconds": 600.0}
    pool = GraderPool([RewardSpec("http", "scorer", options=options, deadline_seconds=4.0)], workers=1)
    try:
        grades = pool.grade([answer(str(number)) for number in range(4)])
    finally:
        silence.set()
        pool.close()
    assert [grade.reward for grade in grades] == [None, None, None, 1.5]
    assert pool.counts == {"scorer: gave no number": 2, "scorer: deadline": 1}
