"""The process that keeps a grading process: it ends it at a deadline, with everything that it started, and says so.

    python -I -S -B <this file>

Standard library only: it is started by its path, and light. The trainer holds its standard input and output; the first
frame is what each grading process is told at its start, every further one a deadline (float64) and a request. Each gets
one frame back: a letter, and what the letter needs.

    R  the grading process's reply
    L  its reply, behind which it left processes running; they were ended, and it with them
    D  nothing: the deadline passed
    X  how the process ended (text)
    B  how the process ended before it was ready, or that it never was (text)

All that grading starts descends from the keeper: processes whose parents end are given to the keeper, not to init
(``PR_SET_CHILD_SUBREAPER``), whatever session or group they put themselves into. So ending all descendants ends all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import struct
import subprocess
import sys
import time

_WORKER = "posttrain_lib.rl.rewards.worker"
_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36
_LARGEST_REPLY = 64 << 20
#: what a process whose pipe is closed may take to end
_GRACE_SECONDS = 1.0
#: how often to look for the trainer: its pipe does not tell of its end where a fork of it holds the other side
_ORPHAN_SECONDS = 2.0

_libc = ctypes.CDLL(None, use_errno=True)


class TrainerGone(Exception):
    """Nobody is left to grade for."""


class Ended(Exception):
    """The grading process ended, or gave something that is no frame; the text says how."""


class Late(Exception):
    """The deadline passed."""


class Child:
    """A grading process that runs."""

    def __init__(self) -> None:
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, str(theirs_in), str(theirs_out)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
            preexec_fn=_die_with_keeper,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self.to, False)
        self.ended = os.pidfd_open(self._process.pid)
        self.pid = self._process.pid
        #: processes that the grader started while it was made, and may keep
        self.own: set[int] = set()

    def close(self) -> None:
        """End it, all that it started, and all that it left behind."""
        end_descendants()
        for descriptor in (self.to, self.back, self.ended):
            os.close(descriptor)

    def how_it_ended(self) -> str:
        """In words, for a process that ended or hides."""
        try:
            code = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return signal.Signals(-code).name if code < 0 else f"exit {code}"


def _die_with_keeper() -> None:
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def exchange(child: Child, sent: bytes, seconds: float, trainer: int) -> bytes:
    """The frame that the child gives for one.

    Raises:
        Ended, Late, TrainerGone.
    """
    deadline = time.monotonic() + seconds
    unsent, got = memoryview(sent), bytearray()
    while (left := deadline - time.monotonic()) > 0:
        writers = [child.to] if unsent else []
        readable, writable, _ = select.select([0, child.back, child.ended], writers, [], min(left, _ORPHAN_SECONDS))
        if 0 in readable or os.getppid() != trainer:  # the trainer says nothing before it has its answer
            raise TrainerGone
        if child.back in readable:
            part = os.read(child.back, 1 << 20)
            if not part:
                raise Ended(child.how_it_ended())
            got += part
            if len(got) >= 4:
                (length,) = struct.unpack_from("<I", got)
                if length > _LARGEST_REPLY or len(got) > 4 + length:
                    raise Ended("no reply that can be read")
                if len(got) == 4 + length:
                    return bytes(got[4:])
        elif child.ended in readable:
            raise Ended(child.how_it_ended())
        if writable:
            with contextlib.suppress(BrokenPipeError):  # then it has ended, as the next turn finds
                unsent = unsent[os.write(child.to, unsent) :]
    raise Late


def descendants(root: int) -> set[int]:
    """Processes below ``root`` that run; zombies are none."""
    found: set[int] = set()
    pending = [root]
    while pending:
        for pid in _children(pending.pop()):
            if pid not in found:
                found.add(pid)
                pending.append(pid)
    return {pid for pid in found if _runs(pid)}


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    return found


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] not in "ZX"
    return False


def end_descendants() -> None:
    """Kill all processes below this one and bury them. Stopped first, so that they fork no more meanwhile.

    Without children there are no descendants: each belongs to one, and those of a process that ends become this one's.
    """
    while True:
        below = descendants(os.getpid())
        for sign in (signal.SIGSTOP, signal.SIGKILL):
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def left_behind(child: Child) -> bool:
    """Whether processes run that the grader did not have when it was made. Orphans that have ended are buried."""
    me = os.getpid()
    for pid in set(_children(me)) - {child.pid}:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return bool(descendants(me) - {child.pid} - child.own)


def start(told: bytes, seconds: float, trainer: int) -> tuple[Child, bytes]:
    """A new grading process, and what it says once its grader is made.

    Raises:
        Ended: it was not made; nothing of it is left. TrainerGone.
    """
    child = Child()
    try:
        ready = exchange(child, frame(told), seconds, trainer)
        if ready.startswith(b"!"):
            raise Ended(ready[1:].decode(errors="replace"))
    except Late:
        child.close()
        raise Ended(f"was not ready after {seconds:g} seconds") from None
    except Ended:
        child.close()
        raise
    child.own = descendants(child.pid)
    return child, ready


def serve(trainer: int) -> None:
    """Answer each frame with one, until TrainerGone. A grading process is started for the first, and after each end."""
    start_seconds, told = read_request(trainer)
    child: Child | None = None
    seconds, request = 0.0, b""
    while True:
        try:
            if child is None:
                child, ready = start(told, start_seconds, trainer)
        except Ended as how:
            say(b"B" + str(how).encode())
        else:
            kind, content = answer(child, request, seconds, trainer) if request else (b"R", ready)
            if kind != b"R":
                child.close()
                child = None
            say(kind + content)
        seconds, request = read_request(trainer)


def answer(child: Child, request: bytes, seconds: float, trainer: int) -> tuple[bytes, bytes]:
    """(letter, content) of the frame that a request gets; of any letter but R the child is to be closed."""
    try:
        reply = exchange(child, frame(request), seconds, trainer)
    except Late:
        return b"D", b""
    except Ended as how:
        return b"X", str(how).encode()
    return b"L" if left_behind(child) else b"R", reply


def read_request(trainer: int) -> tuple[float, bytes]:
    """(seconds, content) of the trainer's next frame. TrainerGone where there is none to come."""
    (length,) = struct.unpack("<I", _read(4, trainer))
    content = _read(length, trainer)
    return struct.unpack_from("<d", content)[0], content[8:]


def _read(size: int, trainer: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        readable, _, _ = select.select([0], [], [], _ORPHAN_SECONDS)
        if os.getppid() != trainer:
            raise TrainerGone
        if readable:
            part = os.read(0, size - len(got))
            if not part:
                raise TrainerGone
            got += part
    return bytes(got)


def frame(content: bytes) -> bytes:
    """As it goes through a pipe: its length (uint32, little-endian), then itself."""
    return struct.pack("<I", len(content)) + content


def say(content: bytes) -> None:
    """One frame to the trainer. TrainerGone where it does not listen."""
    rest = memoryview(frame(content))
    try:
        while rest:
            rest = rest[os.write(1, rest) :]
    except BrokenPipeError:
        raise TrainerGone from None


def main() -> None:
    """Keep a grading process for as long as the trainer is there."""
    trainer = os.getppid()
    _libc.prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    try:
        serve(trainer)
    except TrainerGone:
        pass
    finally:
        end_descendants()


if __name__ == "__main__":
    main()
