"""What the ranks print: each into a file of its own, the first also for the driver's terminal.

    <work>/logs/rank-<n>.log    lines "rank <n> | text"; native code that writes past Python has no such beginning

Eight ranks say most things eight times, so the terminal shows rank 0 alone.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import time
from pathlib import Path


def logs_folder(work: Path) -> Path:
    """Where the ranks' logs are."""
    return work / "logs"


def log_path(work: Path, rank: int) -> Path:
    """The log of a rank; of all its attempts, one after the other."""
    return logs_folder(work) / f"rank-{rank}.log"


class PrefixedLines(io.TextIOBase):
    """A text stream that writes whole lines, each with a prefix, to a file descriptor."""

    def __init__(self, descriptor: int, prefix: str) -> None:
        self._descriptor, self._prefix, self._open = descriptor, prefix, ""

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """What is written to; for those who write past this stream (faulthandler)."""
        return self._descriptor

    def write(self, text: str) -> int:
        """Write what makes whole lines, and keep the rest for later."""
        *lines, self._open = (self._open + text).split("\n")
        if lines:
            whole = "".join(f"{self._prefix}{line}\n" for line in lines)
            os.write(self._descriptor, whole.encode("utf-8", errors="replace"))
        return len(text)

    def flush(self) -> None:
        """Write an unfinished line, ended."""
        if self._open:
            self.write("\n")


def redirect(work: Path, rank: int) -> Path:
    """From now on this process's output, native code's too, goes to the log of ``rank``."""
    path = log_path(work, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdout, sys.stderr = PrefixedLines(1, f"rank {rank} | "), PrefixedLines(2, f"rank {rank} | ")
    os.write(1, f"--- rank {rank}, process {os.getpid()} on {socket.gethostname()}, {time.ctime()}\n".encode())
    return path


class Tail:
    """New whole lines of a log that grows; from its end on, as it is when this is made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        """What came since the last call."""
        try:
            with open(self._path, "rb") as log:
                log.seek(self._place)
                new = log.read()
        except FileNotFoundError:
            return []
        end = new.rfind(b"\n") + 1
        self._place += end
        lines = new[:end].decode("utf-8", errors="replace").splitlines()
        return [line for line in lines if not line.startswith("--- rank ")]


def last_lines(work: Path, rank: int, most: int = 15) -> str:
    """The end of a rank's log, for a rank that could say nothing else."""
    try:
        lines = log_path(work, rank).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-most:])
