"""Each rank's pulse where the driver can read it, and the watchdog that reads it.

    <work>/ranks/rank-<n>.json    step, phase and process of a rank, written anew by a thread of it when it moved
    <work>/ranks/driver.json      how a driver that is no rank got them to run
    <work>/ranks/stop             asks every rank to stop after its step; the text is the reason
    <work>/ranks/stacks           asks every rank for its Python stacks
    <work>/ranks/stacks-<n>.txt   the answer

Files, because the work folder is the one thing that all ranks of every launcher share. The stacks come from the thread
that writes the pulse; where that thread cannot run (native code that holds the interpreter), from a signal handler
in C, for ranks on the driver's own machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain_lib.errors import RETRY_EXIT_CODE
from posttrain_lib.training import pulse

#: the number of a driver that works besides its ranks, where theirs are told
DRIVER = -1
#: on this signal a rank writes its stacks, whatever it does
STACK_SIGNAL = signal.SIGUSR2
#: ranks that may write a file in the same second
_WRITES_A_SECOND = 64
_NAMED = 4
_STACK_SECONDS = 4.0


def ranks_folder(work: Path) -> Path:
    """Where ranks and driver leave each other word."""
    return work / "ranks"


def clear(work: Path) -> None:
    """Forget what earlier ranks left; before any of new ones starts."""
    shutil.rmtree(ranks_folder(work), ignore_errors=True)
    ranks_folder(work).mkdir(parents=True, exist_ok=True)


def ask_all_to_stop(work: Path, reason: str) -> None:
    """Ask every rank to stop after the step it is in."""
    (ranks_folder(work) / "stop").write_text(reason, encoding="utf-8")


class Heart:
    """While inside, a thread of this rank writes its pulse and listens for what is asked of it."""

    def __init__(self, work: Path, rank: int, world: int) -> None:
        self._folder, self._rank = ranks_folder(work), rank
        self._seconds = max(1.0, world / _WRITES_A_SECOND)
        self._pulse = pulse.begin()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heart", daemon=True)
        self._written = -1

    def __enter__(self) -> Heart:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = open(self._folder / f"stacks-{self._rank}.txt", "w", encoding="utf-8")
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        faulthandler.unregister(STACK_SIGNAL)
        self._stacks.close()

    def _live(self) -> None:
        answered = False
        while True:
            over = self._end.wait(self._seconds)
            if self._pulse.beats != self._written:
                self._write()
            if over:
                return
            with contextlib.suppress(OSError):
                pulse.ask_to_stop((self._folder / "stop").read_text(encoding="utf-8"))
            if not answered and (self._folder / "stacks").exists():
                answered = True
                faulthandler.dump_traceback(self._stacks, all_threads=True)

    def _write(self) -> None:
        seen = self._pulse.beats
        content = {**dataclasses.asdict(self._pulse), "pid": os.getpid(), "host": socket.gethostname()}
        path = self._folder / f"rank-{self._rank}.json"
        partial = path.with_suffix(".partial")
        # A storage that fails for a moment is the checkpoint's to report; the next beat writes again.
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(content), encoding="utf-8")
            os.replace(partial, path)
            self._written = seen


def write_driver_pulse(work: Path) -> None:
    """The pulse of a driver that is no rank: how the ranks came to be, for whoever accounts for the start."""
    text = json.dumps(dataclasses.asdict(pulse.current()))
    (ranks_folder(work) / "driver.json").write_text(text, encoding="utf-8")


def read_pulses(work: Path) -> dict[int, dict[str, Any]]:
    """What each rank wrote last, by rank."""
    found = {}
    for path in ranks_folder(work).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):  # being replaced just now
            found[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


class Watchdog:
    """Notices when no rank of a job has moved for ``hang_seconds``.

    One rank that hangs stops them all in the next collective, so "none moves" is the sign, and no figure of a step's
    length is needed. Movement is a changed pulse, timed by this process: clocks of machines are not compared.
    """

    def __init__(self, work: Path, hang_seconds: float) -> None:
        self._work, self._hang_seconds = work, hang_seconds
        self._between = min(30.0, hang_seconds / 5)
        self._seen: dict[int, int] = {}
        self._moved = self._read = time.monotonic()

    def check(self) -> str | None:
        """None while something moves; else who stands where, and the stacks. Cheap to call often."""
        now = time.monotonic()
        if now - self._read < self._between:
            return None
        self._read = now
        pulses = read_pulses(self._work)
        beats = {rank: int(each["beats"]) for rank, each in pulses.items()}
        if beats != self._seen:
            self._seen, self._moved = beats, now
            return None
        if now - self._moved < self._hang_seconds:
            return None
        return self._describe(now - self._moved, pulses)

    def _describe(self, seconds: float, pulses: dict[int, dict[str, Any]]) -> str:
        places: dict[tuple[int, str], list[int]] = {}
        for rank, each in pulses.items():
            places.setdefault((each["step"], each["phase"]), []).append(rank)
        # Those that are where few are come first: the others wait for them.
        ordered = sorted(places.items(), key=lambda item: (len(item[1]), item[0]))
        where = "; ".join(f"{_ranks(ranks)} at step {step}, {phase}" for (step, phase), ranks in ordered)
        suspects = [rank for _, ranks in ordered for rank in ranks][:_NAMED]
        stacks = _stacks(self._work, {rank: pulses[rank] for rank in suspects})
        return "\n".join([f"no rank has moved for {seconds:.0f} s: {where or 'none has started'}", *stacks])


def _ranks(ranks: list[int]) -> str:
    if ranks == [DRIVER]:
        return "the driver"
    named = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


def _stacks(work: Path, pulses: dict[int, dict[str, Any]]) -> Iterator[str]:
    """The stacks of these ranks, asked for by file, then by signal."""
    folder = ranks_folder(work)
    (folder / "stacks").touch()
    answers = {rank: folder / f"stacks-{rank}.txt" for rank in pulses}
    for by_signal in (False, True):
        deadline = time.monotonic() + _STACK_SECONDS
        for rank, each in pulses.items():
            if by_signal and not _text(answers[rank]):
                _signal_rank(each)
        while time.monotonic() < deadline and not all(_text(path) for path in answers.values()):
            time.sleep(0.1)
    time.sleep(0.2)  # a stack that has begun to be written is written within
    for rank, path in answers.items():
        yield f"--- stacks of rank {rank}\n{_text(path) or '(it did not answer)'}"


def _signal_rank(each: dict[str, Any]) -> None:
    if each["host"] == socket.gethostname():
        with contextlib.suppress(OSError):
            os.kill(int(each["pid"]), STACK_SIGNAL)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


class OwnWatch:
    """A watchdog for a driver that is a rank itself: its main thread may be what hangs, so a thread watches.

    On a hang the process prints who stands where and ends with the exit code of "try again".
    """

    def __init__(self, work: Path, hang_seconds: float) -> None:
        self._dog, self._end = Watchdog(work, hang_seconds), threading.Event()
        self._seconds = min(1.0, hang_seconds / 5)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._seconds):
            hung = self._dog.check()
            if hung is not None:
                text = f"TrainingError: {hung}\nthe same command again goes on from the last checkpoint\n"
                os.write(2, text.encode("utf-8", errors="replace"))  # past Python: the main thread may hold its lock
                os._exit(RETRY_EXIT_CODE)
