"""A training job on Ray: N identical actors, a driver that only listens.

Driver  consumes: the ranks' reports, through Ray's streaming generators. Produces: rank 0's reports for the caller.
        Waits for: any rank, a second at a time, so that Ctrl-C and a step's time limit get through.
Actor   runs the whole loop of one rank. Waits for: its peers, in collectives. Unblocked by: them, or their death.

A lost actor (killed, out of memory, its node gone) fails its peers' collectives; all are stopped and started again
from the last checkpoint. Anything an actor raised itself is the user's to see and is not tried again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from posttrain_lib.errors import ConfigError, PosttrainError, TrainingError
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import Events, train

SESSION_FILE = "ray-session.json"
#: Ray's own least is 75 MB; reports are small, tensors never pass through it
_OBJECT_STORE_BYTES = 100 * 2**20
#: after the first failure, how long to listen for the others: the first heard is often only a victim
_SETTLE_SECONDS = 5.0


class WorkerLost(Exception):
    """A rank's process died; the job can go on from its last checkpoint."""


@ray.remote(max_restarts=0, max_task_retries=0)
class TrainingWorker:
    """One rank."""

    def rendezvous(self) -> str:
        """A free ``host:port`` on this actor's node, for rank 0 to listen on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, job: TrainJob) -> Iterator[StepReport | TrainResult]:
        """The loop of this rank: rank 0 streams its reports, every rank ends with the result."""
        events = train(job)
        while True:
            try:
                report = next(events)
            except StopIteration as stop:
                yield stop.value
                return
            if job.rank == 0:
                yield report


def launch_on_ray(job: TrainJob, *, address: str | None, retries: int) -> Events:
    """Run ``job.world`` ranks as actors, restarting them from the last checkpoint when one is lost.

    Raises:
        TrainingError: a rank was lost more than ``retries`` times; or whatever :class:`PosttrainError` a rank raised.
    """
    with ray_session(Path(job.work_dir), address, job.world):
        for attempt in range(retries + 1):
            try:
                return (yield from _run_once(job))
            except WorkerLost as lost:
                if attempt == retries:
                    raise TrainingError(
                        f"a training worker was lost {attempt + 1} times",
                        where=str(lost),
                        expected=f"at most {retries} losses (compute.retries)",
                        fix="look for an out-of-memory kill in the system log; lower train.micro_batch_rows or "
                        "turn on train.activation_checkpointing. Running again goes on from the last checkpoint",
                    ) from lost
                print(f"{lost}; starting again from the last checkpoint", flush=True)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _run_once(job: TrainJob) -> Events:
    devices = {"num_gpus": 1} if job.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= job.world else {}
    workers = [TrainingWorker.options(num_cpus=1, **devices).remote() for _ in range(job.world)]
    try:
        rendezvous = ray.get(workers[0].rendezvous.remote()) if job.world > 1 else None
        streams = {
            rank: worker.run.options(num_returns="streaming").remote(
                dataclasses.replace(job, rank=rank, rendezvous=rendezvous)
            )
            for rank, worker in enumerate(workers)
        }
        return (yield from _listen(streams))
    except RayActorError as error:
        raise WorkerLost(f"a training worker died while starting ({_first_line(error)})") from error
    finally:
        for worker in workers:
            ray.kill(worker)


def _listen(streams: dict[int, Any]) -> Events:
    """Pass on what the ranks stream until all have ended."""
    ranks = {stream: rank for rank, stream in streams.items()}
    result: TrainResult | None = None
    while ranks:
        ready, _ = ray.wait(list(ranks), num_returns=1, timeout=1.0)
        for stream in ready:
            try:
                item = ray.get(next(stream))
            except StopIteration:
                del ranks[stream]
                continue
            except RayError as error:
                raise _blame(ranks.pop(stream), error, ranks) from None
            if isinstance(item, TrainResult):
                result = item
            else:
                yield item
    if result is None:
        raise TrainingError("the workers ended without a result", fix="see the workers' output above")
    return result


def _blame(rank: int, error: RayError, others: dict[Any, int]) -> Exception:
    """Find the rank that failed first in the chain: a dead one, else one that says why, else the first heard."""
    failures = {rank: error}
    deadline = time.monotonic() + _SETTLE_SECONDS
    while others and time.monotonic() < deadline:
        ready, _ = ray.wait(list(others), num_returns=1, timeout=0.5)
        for stream in ready:
            try:
                ray.get(next(stream))
            except StopIteration:
                del others[stream]
            except RayError as another:
                failures[others.pop(stream)] = another
    for dead, failure in failures.items():
        if isinstance(failure, RayActorError):
            return WorkerLost(f"training worker {dead} died ({_first_line(failure)})")
    causes = {who: failure.cause if isinstance(failure, RayTaskError) else failure for who, failure in failures.items()}
    for cause in causes.values():
        if isinstance(cause, PosttrainError):
            return cause
    return TrainingError(
        f"training worker {rank} failed", where=f"rank {rank}", got=f"\n{failures[rank]}", fix="see its traceback above"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


@contextlib.contextmanager
def ray_session(work: Path, address: str | None, workers: int) -> Iterator[None]:
    """Be connected to Ray while inside: to the cluster at ``address``, else to a private one that ends with us."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    remove_orphans(work)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": True}
    if address is not None:
        _check_reachable(address)
        import posttrain_lib

        ray.init(address=address, runtime_env={"py_modules": [posttrain_lib]}, **quiet)
    else:
        ray.init(
            address="local",
            num_cpus=max(workers, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )
        session = {"driver": os.getpid(), "session": Path(ray._private.worker.global_worker.node.get_session_dir_path()).name}
        (work / SESSION_FILE).write_text(json.dumps(session), encoding="utf-8")
    try:
        yield
    finally:
        ray.shutdown()
        (work / SESSION_FILE).unlink(missing_ok=True)


def remove_orphans(work: Path) -> list[int]:
    """Stop what a killed driver's private Ray left running (its agents outlive it); returns the process ids."""
    path = work / SESSION_FILE
    if not path.is_file():
        return []
    session = json.loads(path.read_text(encoding="utf-8"))
    removed = []
    if not Path(f"/proc/{session['driver']}").exists():
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # the process ended while we looked
                if session["session"].encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
                    removed.append(int(entry.name))
    path.unlink(missing_ok=True)
    return removed


def _check_reachable(address: str) -> None:
    """Ray waits for minutes on a dead address; a socket says at once."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            "no Ray cluster answers", where="compute.address", got=f"{address} ({error})", expected="host:port of a head node"
        ) from error
