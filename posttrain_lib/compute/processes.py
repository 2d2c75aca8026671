"""The processes of a private Ray: written down while they run, stopped when their driver is gone.

A private Ray is a dozen processes. They end with their driver, but one that is killed with SIGKILL leaves some behind.
So their ids are kept in a file of the job's work folder, and two parties read it: the next start in that folder, and a
watcher. The watcher is a small process of its own (``python -m posttrain_lib.compute.processes <work>``) that
sleeps until its input closes, which the kernel does when the driver dies, however it dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.digests import write_atomically

SESSION_FILE = "ray-session.json"
#: what Ray's own processes get to end by themselves after their driver
_GRACE_SECONDS = 10.0


def record_processes(work: Path, folder: Path | None) -> None:
    """Write down all processes below this one, and the folder that goes with them."""
    driver = os.getpid()
    content = {
        "driver": [driver, started_at(driver)],
        "processes": [[pid, started_at(pid)] for pid in descendants(driver)],
        "folder": None if folder is None else str(folder),
    }
    write_atomically(work / SESSION_FILE, json.dumps(content))


@contextlib.contextmanager
def watched(work: Path) -> Iterator[None]:
    """While inside, a watcher stands by to stop what :func:`record_processes` wrote down, should this process die."""
    command = [sys.executable, "-m", "posttrain_lib.compute.processes", str(work)]
    # A session of its own: what kills the driver's process group must not kill the watcher.
    watcher = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        watcher.kill()  # the session has ended by itself
        watcher.wait()
        assert watcher.stdin is not None
        watcher.stdin.close()


def remove_orphans(work: Path) -> list[int]:
    """Stop what a killed driver's private Ray left running; returns the ids of the processes that were stopped.

    Process ids come round again, so a process is only stopped if it started when the record says.
    """
    path = work / SESSION_FILE
    try:
        session = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    driver, started = session["driver"]
    if driver != os.getpid() and started_at(driver) == started:
        raise ConfigError(
            "another process is training in this work folder",
            where=work,
            got=f"process {driver}",
            fix="wait for it, or stop it",
        )
    stopped = []
    for pid, started in session["processes"]:
        if started_at(pid) == started and pid != os.getpid():  # the watcher is one of them
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                stopped.append(pid)
    if session["folder"] is not None:
        shutil.rmtree(session["folder"], ignore_errors=True)
    path.unlink(missing_ok=True)
    return stopped


def descendants(root: int) -> list[int]:
    """Ids of all processes below ``root``."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, pending = [], [root]
    while pending:
        below = children.get(pending.pop(), [])
        found.extend(below)
        pending.extend(below)
    return found


def started_at(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None where there is no such process, or only its zombie."""
    fields = _stat(pid)
    return None if not fields or fields[0] == "Z" else int(fields[19])


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on (the command before it may hold anything)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def main(work: Path) -> None:
    """Wait for the driver's death, then stop what it left."""
    sys.stdin.buffer.read()
    time.sleep(_GRACE_SECONDS)
    with contextlib.suppress(ConfigError):  # another driver works there by now, and has cleaned up itself
        remove_orphans(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
