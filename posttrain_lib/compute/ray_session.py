"""Being connected to Ray: a private local one that ends with its driver, or a running cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import RayError

from posttrain_lib.compute.processes import SESSION_FILE, record_processes, remove_orphans, watched
from posttrain_lib.errors import ConfigError, TrainingError

PROJECT_ROOT = Path(__file__).resolve().parents[2]
#: Ray's own least is 75 MB; reports are small, tensors never pass through it
_OBJECT_STORE_BYTES = 80 * 2**20
#: sun_path holds 107 characters; Ray puts "/session_<date>_<time>_<pid>/sockets/plasma_store" behind its folder
_LONGEST_FOLDER = 40
#: how long a head node may take to answer
_ANSWER_SECONDS = 10.0

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
    # What workers print goes to logs of their own (see compute.logs), of which the driver shows the first.
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    # The watcher goes last: a driver that is killed while it ends leaves as much behind as any other.
    with _environment(_ENVIRONMENT), watched(work) if address is None else contextlib.nullcontext():
        session = RaySession(work, address is None, _session_folder() if address is None else None)
        try:
            if address is not None:
                _join(address, quiet)
            else:
                _start_private(cores, session.folder, quiet)
            session.record()
            yield session
        finally:
            ray.shutdown()
            if session.folder is not None:
                shutil.rmtree(session.folder, ignore_errors=True)
            if session.private:
                (work / SESSION_FILE).unlink(missing_ok=True)


def _start_private(cores: int, folder: Path | None, quiet: Mapping[str, Any]) -> None:
    """Start a Ray of this process's own.

    Raises:
        TrainingError: it did not come up in Ray's own time limits, as on an overloaded machine.
    """
    try:
        ray.init(
            address="local",  # a bare init would join any Ray that happens to run on this machine
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=None if folder is None else str(folder),
            **quiet,
        )
    except Exception as error:  # Ray raises plain Exception here
        raise TrainingError(
            "the private local Ray did not start",
            got=next(iter(str(error).strip().splitlines()), type(error).__name__),
            fix="if the machine is overloaded, run again when it is not; training goes on from its last checkpoint",
        ) from error


def _join(address: str, quiet: Mapping[str, Any]) -> None:
    """Connect to a running cluster; the project goes with it, as the cluster's machines may not have it."""
    address = resolved(address)
    check_reachable(address)
    try:
        ray.init(address=address, runtime_env={"py_modules": [str(PROJECT_ROOT / "posttrain_lib")]}, **quiet)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:  # another version, not a head, no rights
        raise _nobody(address, error) from error


def resolved(address: str) -> str:
    """``auto`` is the cluster that this process was started in: jobs that a cluster runs are told by $RAY_ADDRESS."""
    if address != "auto":
        return address
    if not (found := os.environ.get("RAY_ADDRESS")):
        raise ConfigError(
            "compute.address is auto, and RAY_ADDRESS is not set",
            where="compute.address",
            fix="start the step as a job of the cluster (ray job submit, KubeRay's RayJob), or name the head's address",
        )
    return found


def check_reachable(address: str) -> None:
    """ConfigError unless Ray answers at ``host:port`` or ``ray://host:port`` within seconds; itself it waits minutes.

    Of ``ray://`` only the socket is tried: joining it has a limit of its own.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
        if not address.startswith("ray://"):
            _ask_head(address)
    except (OSError, ValueError) as error:
        raise _nobody(address, error) from error


def _ask_head(address: str) -> None:
    """An OSError unless a head node answers; Ray's client has no time limit, so it gets a thread of its own."""
    refused: list[Exception] = []

    def ask() -> None:
        try:
            GcsClient(address=address)
        except Exception as error:  # for the caller, whatever it is
            refused.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    if asking.is_alive():
        raise TimeoutError(f"something listens there and does not answer as a Ray head within {_ANSWER_SECONDS:g} s")
    if refused:
        raise ConnectionError(str(refused[0]).strip().split(". ")[0]) from refused[0]


def _nobody(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        "no Ray cluster answers",
        where="compute.address",
        got=f"{address} ({next(iter(str(error).strip().splitlines()), type(error).__name__)})",
        expected="host:port of a running head node (usually 6379), or ray://host:port of its client server (10001)",
        fix="start one (ray start --head) with the same versions of Ray and Python, or leave compute.address out for a "
        "private local Ray; where the cluster checks tokens, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
    )


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
