"""The trainer's end of a grading process and its keeper."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.source_digest import module_file
from posttrain_lib.rl.rewards.base import RewardSpec, Verdict, cannot_be_made
from posttrain_lib.schema.rollouts import Answer

#: by its name, so that a step's source digest finds it
_KEEPER = module_file("posttrain_lib.rl.rewards.keeper")
#: what a keeper may take to end what is left, before it is killed itself
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Failure:
    """Why an answer has no value: a ``kind``, of which there are few, for counts, and what else is known."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


class GradingProcess:
    """One grader in a process of its own; for one thread at a time. Starting does not wait, :meth:`ready` does.

    Args:
        spec: of the grader.
        start_seconds: what making it may take, each time.
    """

    def __init__(self, spec: RewardSpec, start_seconds: float) -> None:
        self._spec = spec
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        # A session of its own: a terminal's Ctrl-C is the trainer's to act on.
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_KEEPER)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        #: whether it can be asked
        self.is_open = True
        self._ready: bool | None = None
        self._tell(start_seconds, pickle.dumps(spec))

    def ready(self) -> bool:
        """Wait until the grader is made; whether it takes several answers at once.

        Raises:
            ConfigError: it cannot be made. The process is then closed.
        """
        if self._ready is None:
            letter, content = self._hear()
            if letter != b"R":
                self.close()
                raise cannot_be_made(self._spec, content.decode(errors="replace"))
            self._ready = bool(json.loads(content)["batched"])
        return self._ready

    def grade(self, answers: Sequence[Answer]) -> tuple[list[Verdict | Failure] | Failure, bool]:
        """(an outcome for each answer, or one of the call as a whole; whether it left processes running)."""
        try:
            self.ready()
            request = pickle.dumps([_plain(answer) for answer in answers])
        except ConfigError as error:
            return Failure("grader cannot be made", str(error.got)), False
        except Exception as error:  # any class of the row's may refuse to be pickled, in its own way
            return Failure("cannot be sent to its process", f"{type(error).__name__}: {error}"[:500]), False
        self._tell(self._spec.deadline_seconds, request)
        letter, content = self._hear()
        if letter in (b"R", b"L"):
            return _outcomes(content, len(answers)), letter == b"L"
        return _FAILURES[letter](self._spec, content.decode(errors="replace")), False

    def close(self) -> None:
        """End the process and everything that it started."""
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self.is_open = False
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        try:
            self._keeper.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        self._keeper.stdout.close()

    def _tell(self, seconds: float, content: bytes) -> None:
        assert self._keeper.stdin is not None
        message = struct.pack("<d", seconds) + content
        with contextlib.suppress(BrokenPipeError, ValueError):  # ended or closed: hearing it says so
            self._keeper.stdin.write(struct.pack("<I", len(message)) + message)
            self._keeper.stdin.flush()

    def _hear(self) -> tuple[bytes, bytes]:
        assert self._keeper.stdout is not None
        try:
            (length,) = struct.unpack("<I", self._keeper.stdout.read(4))
            (letter, content) = struct.unpack(f"c{length - 1}s", self._keeper.stdout.read(length))
        except (ValueError, struct.error):  # closed by another thread; ended, be it within a frame
            self.is_open = False
            return b"K", b""
        return letter, content


_FAILURES = {
    b"D": lambda spec, _: Failure("deadline", f"stopped after {spec.deadline_seconds:g} seconds"),
    b"X": lambda _, how: Failure("process ended", how),
    b"B": lambda _, how: Failure("grader cannot be made", how),
    b"K": lambda *_: Failure("keeper ended"),
}


def _plain(answer: Answer) -> Answer:
    """With dictionaries in place of other mappings, some of which cannot be pickled."""
    prompt = tuple(dict(message) for message in answer.prompt)
    return Answer(prompt, answer.text, answer.expected, dict(answer.extra), answer.tokens, answer.finished)


def _outcomes(content: bytes, count: int) -> list[Verdict | Failure] | Failure:
    try:
        said = json.loads(content)
        found: list[Verdict | Failure] = [
            Failure(one["failure"], one["detail"]) if "failure" in one else Verdict(one["value"], one["correct"])
            for one in said
        ]
    except (ValueError, TypeError, KeyError):
        return Failure("no reply that can be read")
    if len(found) == count:
        return found
    return found[0] if len(found) == 1 and isinstance(found[0], Failure) else Failure("no reply that can be read")
