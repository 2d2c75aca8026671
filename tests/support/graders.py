"""Graders of tests, by ``module:attribute``: in the grading process, an answer's text says what its grading does."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain_lib.rl.rewards.base import Verdict
from posttrain_lib.schema.rollouts import Answer


def answer(text: str, expected: str | None = None, *, tokens: int = 0, finished: bool = True, **extra: Any) -> Answer:
    """To a question that nobody asks."""
    return Answer(({"role": "user", "content": "Well?"},), text, expected, extra, tokens, finished)


def length_of(answer: Answer) -> float:
    """Characters."""
    return float(len(answer.text))


def obey(answer: Answer) -> Any:
    """Do what the text says: a number, or one of the faults below."""
    fault = FAULTS.get(answer.text)
    return float(answer.text) if fault is None else fault(answer)


class Unpicklable(Exception):
    """Holds what cannot be sent, and says more than anyone reads."""

    def __init__(self) -> None:
        super().__init__("no\ud800 " + "word " * 100_000)
        self.payload = lambda: None


class Unspeakable(Exception):
    """Has no text either."""

    def __str__(self) -> str:
        raise RuntimeError("nothing to say")


def _sleep(answer: Answer) -> float:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    while True:
        time.sleep(3600)


def _tell(answer: Answer) -> None:
    """This process's id to whoever waits for it."""
    with open(answer.extra["told"], "a") as file:
        file.write(f"{os.getpid()}\n")


def _leave_processes(answer: Answer) -> float:
    """One in the group, one that left session and parent."""
    for alone in (False, True):
        reading, writing = os.pipe()
        if os.fork() == 0:
            if alone:
                os.setsid()
                if os.fork():
                    os._exit(0)
            _tell(answer)
            os.write(writing, b".")
            _sleep(answer)
        os.read(reading, 1)
    return 1.0


def _fork_and_sleep(answer: Answer) -> float:
    _leave_processes(answer)
    return _sleep(answer)


def _fork_and_exit(answer: Answer) -> float:
    _leave_processes(answer)
    os._exit(3)


def _fork_and_answer_twice(answer: Answer) -> float:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return 1.0 if child else 2.0


def _kill_keeper(answer: Answer) -> float:
    _tell(answer)
    os.kill(os.getppid(), signal.SIGKILL)
    return _sleep(answer)


def _hog(answer: Answer) -> float:
    held = []
    while True:
        held.append(bytearray(64 << 20))


def _print(answer: Answer) -> float:
    print("x" * (8 << 20), flush=True)
    os.write(1, b"\x04\x00\x00\x00null" * 1000)
    os.write(2, b"y" * (1 << 20))
    sys.stderr.flush()
    return 1.0


def _raise(error: BaseException) -> Callable[[Answer], float]:
    def grade(answer: Answer) -> float:
        raise error

    return grade


def _close_all(answer: Answer) -> float:
    os.closerange(3, 1000)
    return 1.0


def _scribble(answer: Answer) -> float:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            continue
    return 1.0


FAULTS: dict[str, Callable[[Answer], Any]] = {
    "sleep": _sleep,
    "leave processes": _leave_processes,
    "fork and sleep": _fork_and_sleep,
    "fork and exit": _fork_and_exit,
    "fork and answer twice": _fork_and_answer_twice,
    "kill keeper": _kill_keeper,
    "exit": lambda _: os._exit(0),
    "sys.exit": lambda _: sys.exit(0),
    "segfault": lambda _: ctypes.string_at(0),
    "hog": _hog,
    "print": _print,
    "raise": _raise(ValueError("no good")),
    "unpicklable": _raise(Unpicklable()),
    "unspeakable": _raise(Unspeakable()),
    "interrupt": _raise(KeyboardInterrupt()),
    "close all": _close_all,
    "scribble": _scribble,
    "nan": lambda _: float("nan"),
    "inf": lambda _: float("-inf"),
    "huge": lambda _: 10**400,
    "text": lambda _: "1.0",
    "none": lambda _: None,
    "bool": lambda _: True,
    "list": lambda _: [1.0],
    "complex": lambda _: 1j,
    "nan verdict": lambda _: Verdict(float("nan"), True),
    "false verdict": lambda _: Verdict(1.0, "yes"),  # type: ignore[arg-type]
    "modules": lambda _: float(any(name in sys.modules for name in ("torch", "transformers", "pytest"))),
}


class Counting:
    """How many answers this process has graded: its state lives between answers."""

    def __init__(self) -> None:
        self.graded = 0

    def __call__(self, answer: Answer) -> float:
        """Beginning with 1."""
        self.graded += 1
        return float(self.graded)


class Batched:
    """Gives the size of the batch that an answer was in; does as :func:`obey` where one is a fault."""

    def grade_many(self, answers: Sequence[Answer]) -> list[Any]:
        """A call fails as a whole where a text says so."""
        if any(answer.text == "too few" for answer in answers):
            return [1.0] * (len(answers) - 1)
        return [obey(answer) if answer.text in FAULTS else float(len(answers)) for answer in answers]


class Broken:
    """Cannot be made, in some way."""

    def __init__(self, how: str) -> None:
        obey(answer(how))


class Forked:
    """Forks while it is made, and lets both come out."""

    def __init__(self) -> None:
        os.fork()

    def __call__(self, answer: Answer) -> float:
        """The text's number."""
        return float(answer.text)


class OnceMade:
    """Can be made the first time only."""

    def __init__(self, marker: str) -> None:
        Path(marker).touch(exist_ok=False)

    def __call__(self, answer: Answer) -> float:
        """As :func:`obey`."""
        return obey(answer)
