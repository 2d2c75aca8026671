"""Being connected to Ray: a private local one that ends with its driver, or a running cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from posttrain_lib.compute.processes import SESSION_FILE, record_processes, remove_orphans, watched
from posttrain_lib.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parents[2]
#: Ray's own least is 75 MB; reports are small, tensors never pass through it
_OBJECT_STORE_BYTES = 80 * 2**20
#: sun_path holds 107 characters; Ray puts "/session_<date>_<time>_<pid>/sockets/plasma_store" behind its folder
_LONGEST_FOLDER = 40

#: Inherited by every process of a private Ray. OpenMP's threads may spin for a moment while they wait, then sleep:
#: threads that never sleep fight with every other process of the machine, threads that never spin wake too late.
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
        record_processes(self.work, self.folder)


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
            with watched(work) if session.private else contextlib.nullcontext():
                yield session
        finally:
            ray.shutdown()
            if session.folder is not None:
                shutil.rmtree(session.folder, ignore_errors=True)
            if session.private:
                (work / SESSION_FILE).unlink(missing_ok=True)


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
