"""The agent that asks a model, against a real HTTP server on loopback that answers from a script."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.conversion.brief import Brief
from posttrain_lib.conversion.convert import convert
from posttrain_lib.conversion.family_file import FamilyFile
from posttrain_lib.conversion.llm import CommandModel, EndpointModel, LLMAgent, reference_source
from posttrain_lib.conversion.protocol import Budget, GiveUp
from posttrain_lib.conversion.sandbox import Limits

BRIEF = Brief({"hidden_size": 8}, {}, {"model.norm.weight": (8,)}, {}, names=("olmo2", "Olmo2ForCausalLM"))
#: an answer: text of a completion, a status, raw bytes, or seconds to wait
Answer = str | int | bytes | float


@contextmanager
def endpoint(*answers: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base url, requests so far) of a server that gives these answers in turn."""
    pending, requests = list(answers), list[dict[str, Any]]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append({"path": self.path, "headers": dict(self.headers), "body": json.loads(body)})
            answer = pending.pop(0)
            if isinstance(answer, float):
                time.sleep(answer)
                answer = 503
            if isinstance(answer, int):
                self.send_error(answer)
                return
            completion = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
            content = answer if isinstance(answer, bytes) else json.dumps(completion).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def agent_at(url: str, **options: Any) -> LLMAgent:
    model = EndpointModel(url, "tiny", timeout_seconds=options.pop("timeout_seconds", 30.0), **options.pop("model", {}))
    return LLMAgent(model, pause_seconds=0.0, **options)


def test_the_request_is_what_the_protocol_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "k-123")
    with endpoint("```python\nX = 1\n```") as (url, requests):
        found = agent_at(url, model={"api_key_variable": "SOME_KEY"}).propose(BRIEF, [])
    assert found == FamilyFile("X = 1\n")
    request = requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == "Bearer k-123"
    assert request["body"]["model"] == "tiny"
    system, user = (message["content"] for message in request["body"]["messages"])
    assert "class DecoderConfig" in system and "def in_layer" in system
    assert "model.norm.weight" in user and "class Olmo2Attention" in user
    assert "k-123" not in json.dumps(request["body"])


def test_failures_of_the_endpoint_are_retried_and_reported() -> None:
    with endpoint(500, b"not json", b'{"choices": []}', 5.0, "```\nX = 1\n```") as (url, requests):
        found = agent_at(url, retries=4, timeout_seconds=1.0).propose(BRIEF, [])
    assert isinstance(found, FamilyFile)
    assert found.text == "X = 1\n"
    assert len(requests) == 5
    for said in ("4 failed requests", "HTTP 500", "JSONDecodeError", "IndexError", "timed out"):
        assert said in found.note


def test_retries_end() -> None:
    with endpoint(500, 429, 503) as (url, requests):
        found = agent_at(url, retries=2).propose(BRIEF, [])
    assert isinstance(found, GiveUp)
    assert "3 requests: HTTP 500; HTTP 429; HTTP 503" in found.reason
    assert len(requests) == 3


def test_what_asking_again_cannot_mend_is_not_retried() -> None:
    with endpoint(401) as (url, requests):
        found = agent_at(url).propose(BRIEF, [])
    assert isinstance(found, GiveUp) and "HTTP 401" in found.reason
    assert len(requests) == 1


def test_nobody_at_the_address_is_said() -> None:
    with endpoint() as (url, _):
        pass
    found = agent_at(url, retries=1).propose(BRIEF, [])
    assert isinstance(found, GiveUp) and "refused" in found.reason


def test_a_model_may_give_up() -> None:
    with endpoint("GIVE UP: there is no block for this") as (url, _):
        assert agent_at(url).propose(BRIEF, []) == GiveUp("there is no block for this")


def test_a_command_does_as_well(tmp_path: Path) -> None:
    script = "import sys; text = sys.stdin.read(); print('```python\\nX =', 'DecoderConfig' in text, '\\n```')"
    found = LLMAgent(CommandModel((sys.executable, "-c", script))).propose(BRIEF, [])
    assert found == FamilyFile("X = True \n")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((sys.executable, "-c", "raise SystemExit('no idea')"), "no idea"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "more than 1 seconds"),
        (("no-such-program",), "cannot be started"),
    ],
)
def test_a_command_that_fails_is_reported(command: tuple[str, ...], said: str) -> None:
    found = LLMAgent(CommandModel(command, timeout_seconds=1.0), retries=1, pause_seconds=0.0).propose(BRIEF, [])
    assert isinstance(found, GiveUp) and said in found.reason


def test_the_reference_is_found_by_its_type() -> None:
    assert "class Gemma3RMSNorm" in str(reference_source("gemma3_text"))
    assert reference_source("no_such_family") is None


@pytest.mark.slow
def test_bad_proposals_come_back_with_their_reason_and_a_good_one_passes(
    family_folder: Callable[[str], Path], tmp_path: Path, as_proposal: Callable[[str], str]
) -> None:
    good = as_proposal("olmo2")
    marker = tmp_path / "written"
    head = good.partition("\ndef read_config")[0] + "\n"

    def with_line(line: str) -> str:
        return good.replace('    """Defaults are', f'    {line}\n    """Defaults are')

    bad = {
        "syntax error": ("def read_config(fields:", "refused", "SyntaxError"),
        "endless loop": (with_line("all(a == 0 for a in iter(int, 1))"), "timeout", "5 seconds"),
        "memory hog": (with_line("hog = [0] * 10**10"), "failed", "MemoryError"),
        "a file": (with_line(f"open({str(marker)!r}, 'w')"), "refused", "uses open"),
        "a file, hidden": (
            head + f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n",
            "refused",
            "imports pathlib",
        ),
        "the gate's limit": (
            good.replace(
                "from posttrain_lib.models.families import Family",
                "from posttrain_lib.models.families import Family\n"
                "import posttrain_lib.checkpoint.verify_documents as gate\ngate.NOISE_FACTOR = 1e9",
            ),
            "refused",
            "imports posttrain_lib.checkpoint",
        ),
        "another definition": (good.replace('qk_norm="projection"', 'qk_norm="head"'), "refused", "another shape"),
        "a wrong constant": (good.replace("late_cast=True", "late_cast=False"), "differs", "norms, bfloat16"),
    }
    answers = [f"Here it is:\n```python\n{text}\n```" for text, _, _ in bad.values()]
    with endpoint(*answers, 500, f"```python\n{good}\n```") as (url, requests):
        found = convert(
            family_folder("olmo2"),
            agent_at(url),
            tmp_path / "out",
            budget=Budget(12, 900.0),
            limits=Limits(seconds=5.0, memory_gib=0.5, gate_seconds=120.0),
            removed=["olmo2"],
        )
    for attempt, (name, (_, outcome, said)) in zip(found.outcome.attempts, bad.items(), strict=False):
        assert (name, attempt.outcome) == (name, outcome), attempt.summary
        assert said in f"{attempt.error} {json.dumps(attempt.report)}", (name, attempt.error)
    assert not marker.exists()
    assert found.outcome.attempts[-1].passed
    assert "HTTP 500" in found.outcome.attempts[-1].note
    assert found.file is not None and 'Family("olmo2", "Olmo2ForCausalLM"' in found.file
    # Each request carries what became of the one before it.
    assert "SyntaxError" in requests[1]["body"]["messages"][1]["content"]
    assert "norms, bfloat16" in requests[-1]["body"]["messages"][1]["content"]
