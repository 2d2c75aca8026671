"""Being connected to Ray: a private local one that ends with its driver, or a running cluster.

A private Ray is made of a dozen processes. They end with their driver, but a driver that is killed with SIGKILL leaves
some behind; so their ids are written into the job's work folder, and the next start there stops them first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.digests import write_atomically

SESSION_FILE = "ray-session.json"
PROJECT_ROOT = Path(__file__).resolve().parents[2]
#: Ray's own least is 75 MB; reports are small, tensors never pass through it
_OBJECT_STORE_BYTES = 80 * 2**20
#: sun_path holds 107 characters; Ray puts "/session_<date>_<time>_<pid>/sockets/plasma_store" behind its folder
_LONGEST_FOLDER = 40

#: Inherited by every process of a private Ray. OpenMP's threads may spin for a moment while they wait, then sleep.
#: Seconds of a step of configs/sft/default.yaml, two threads on two cores, alone / beside two other processes:
#: default 0.36 / 1.31 (3 to 6 beside other OpenMP programs), 1000 spins 0.32 / 0.77, no spinning 0.54 / 0.51.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "GOMP_SPINCOUNT": "1000"}


@dataclass(frozen=True)
class RaySession:
    """An open connection. ``private``: this process started that Ray; ``folder`` is then what is removed with it."""

    work: Path
    private: bool
    folder: Path | None

    def record(self) -> None:
        """Write down which processes belong to this session; again whenever it has started more."""
        if not self.private:
            return
        driver = os.getpid()
        content = {
            "driver": [driver, _started(driver)],
            "processes": [[pid, _started(pid)] for pid in _descendants(driver)],
            "folder": None if self.folder is None else str(self.folder),
        }
        write_atomically(self.work / SESSION_FILE, json.dumps(content))


@contextlib.contextmanager
def ray_session(work: Path, address: str | None, cores: int) -> Iterator[RaySession]:
    """Be connected to Ray while inside: to the cluster at ``address``, else to a private one with ``cores`` CPUs.

    Raises:
        ConfigError: nothing answers at ``address``.
    """
    work.mkdir(parents=True, exist_ok=True)
    remove_orphans(work)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": True}
    with _environment(_ENVIRONMENT):
        session = RaySession(work, address is None, _session_folder() if address is None else None)
        try:
            if address is not None:
                check_reachable(address)
                import posttrain_lib

                ray.init(address=address, runtime_env={"py_modules": [posttrain_lib]}, **quiet)
            else:
                ray.init(
                    address="local",  # a bare init would join any Ray that happens to run on this machine
                    num_cpus=cores,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=None if session.folder is None else str(session.folder),
                    **quiet,
                )
            session.record()
            yield session
        finally:
            ray.shutdown()
            if session.folder is not None:
                shutil.rmtree(session.folder, ignore_errors=True)
            if session.private:
                (work / SESSION_FILE).unlink(missing_ok=True)


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
    if driver != os.getpid() and _started(driver) == started:
        raise ConfigError(
            "another process is training in this work folder",
            where=work,
            got=f"process {driver}",
            fix="wait for it, or stop it",
        )
    stopped = []
    for pid, started in session["processes"]:
        if _started(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                stopped.append(pid)
    if session["folder"] is not None:
        shutil.rmtree(session["folder"], ignore_errors=True)
    path.unlink(missing_ok=True)
    return stopped


def check_reachable(address: str) -> None:
    """ConfigError unless something listens at ``host:port``: Ray itself waits for minutes, a socket says at once."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            "no Ray cluster answers",
            where="compute.address",
            got=f"{address} ({error})",
            expected="host:port of a running head node",
            fix="start one (ray start --head), or leave compute.address out for a private local Ray",
        ) from error


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set yet, and let the project be imported by child processes; undone afterwards."""
    before = dict(os.environ)
    for name, value in values.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT), *filter(None, [before.get("PYTHONPATH")])])
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def _session_folder() -> Path | None:
    """A fresh folder for a private Ray; None (Ray's own choice) where its path is too long for sockets."""
    folder = tempfile.mkdtemp(prefix="ray-")
    if len(folder) <= _LONGEST_FOLDER:
        return Path(folder)
    os.rmdir(folder)
    return None


def _descendants(root: int) -> list[int]:
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


def _started(pid: int) -> int | None:
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
