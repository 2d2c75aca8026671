"""A training job on Ray: N identical actors, a driver that only listens.

Driver  consumes: the ranks' reports, through Ray's streaming generators. Produces: rank 0's reports for the caller.
        Waits for: any rank, a second at a time, so that Ctrl-C and a step's time limit get through.
Actor   runs the whole loop of one rank. Waits for: its peers, in collectives. Unblocked by: them, or their death.

A lost actor (killed, out of memory, its node gone) fails its peers' collectives; all are stopped and started again
from the last checkpoint. Anything an actor raised itself is the user's to see and is not tried again.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from posttrain_lib.compute.ray_session import RaySession, ray_session
from posttrain_lib.errors import ConfigError, PosttrainError, TrainingError
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import Events, train

#: after the first failure, how long to listen for the others: the first heard is often only a victim
_SETTLE_SECONDS = 5.0
#: how long the actors may take to come up; a cluster may have to start machines for them
_START_SECONDS = 900.0
_POLL_SECONDS = 1.0
#: what a rank says whose peer has gone
_VICTIM_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_VICTIM_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class WorkerLostError(Exception):
    """A rank's process died; the job can go on from its last checkpoint."""


class TrainingWorker:
    """One rank, as an actor."""

    def rendezvous(self, private: bool) -> str:
        """A free ``host:port`` of this actor's node, for rank 0 to listen on; loopback if all ranks are on one."""
        host = "127.0.0.1" if private else ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

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

    On a cluster, the job's folders must be on storage that every node sees.

    Raises:
        TrainingError: a rank was lost more than ``retries`` times; or whatever :class:`PosttrainError` a rank raised.
        ConfigError: no cluster at ``address``, or fewer GPUs than workers where ``device`` asks for them.
    """
    cores = max(job.world, len(os.sched_getaffinity(0)))
    for attempt in range(retries + 1):
        try:
            # A session of its own for each attempt: whatever killed a worker may have hurt Ray as well.
            with ray_session(Path(job.work_dir), address, cores) as session:
                return (yield from _run_once(job, session))
        except WorkerLostError as lost:
            if attempt == retries:
                raise TrainingError(
                    f"a training worker was lost {attempt + 1} times",
                    where=str(lost),
                    expected=f"at most {retries} losses (compute.retries)",
                    fix="look for an out-of-memory kill in the system log; lower train.micro_batch_rows or "
                    "set train.activation_checkpointing: full. Running again goes on from the last checkpoint",
                ) from lost
            print(f"{lost}; starting again from the last checkpoint", flush=True)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _run_once(job: TrainJob, session: RaySession) -> Events:
    actor = ray.remote(max_restarts=0, max_task_retries=0, **_resources(job))(TrainingWorker)
    workers = [actor.remote() for _ in range(job.world)]
    try:
        rendezvous = _first_contact(workers, private=session.private)
        session.record()
        streams = {
            rank: worker.run.options(num_returns="streaming").remote(
                dataclasses.replace(job, rank=rank, rendezvous=rendezvous)
            )
            for rank, worker in enumerate(workers)
        }
        return (yield from _listen(streams))
    finally:
        for worker in workers:
            if ray.is_initialized():
                ray.kill(worker)


def _resources(job: TrainJob) -> dict[str, float]:
    """What Ray reserves for a rank: its threads, and a GPU where the job uses them."""
    if job.device == "cpu":
        return {"num_cpus": 1}
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus >= job.world:
        return {"num_cpus": 1, "num_gpus": 1}
    if job.device == "cuda":
        raise ConfigError(
            "Ray has fewer GPUs than the job has workers",
            where="compute.devices_per_node",
            got=f"{job.world} workers",
            expected=f"at most {gpus:g}",
            fix="lower compute.devices_per_node, or give Ray more GPUs",
        )
    return {"num_cpus": 1}


def _first_contact(workers: list[Any], *, private: bool) -> str:
    """Wait until every actor answers; rank 0's answer is the rendezvous."""
    answers = [worker.rendezvous.remote(private) for worker in workers]
    deadline = time.monotonic() + _START_SECONDS
    while len(ray.wait(answers, num_returns=len(answers), timeout=_POLL_SECONDS)[0]) < len(answers):
        if time.monotonic() > deadline:
            raise TrainingError(
                "the training workers did not start",
                where=f"{len(workers)} workers",
                got=f"Ray has {ray.available_resources()} free",
                fix="wait for the cluster to be free, or ask for fewer workers",
            )
    try:
        return str(ray.get(answers)[0])
    except RayActorError as error:
        raise WorkerLostError(f"a training worker died while starting ({_first_line(error)})") from error


def _listen(streams: dict[int, Any]) -> Events:
    """Pass on what the ranks stream until all have ended."""
    ranks = {stream: rank for rank, stream in streams.items()}
    result: TrainResult | None = None
    while ranks:
        ready, _ = ray.wait(list(ranks), num_returns=1, timeout=_POLL_SECONDS)
        for stream in ready:
            try:
                item = ray.get(next(stream))
            except StopIteration:
                del ranks[stream]
                continue
            except RayError as error:
                raise _blame({ranks.pop(stream): error}, ranks) from None
            if isinstance(item, TrainResult):
                result = item
            else:
                yield item
    if result is None:
        raise TrainingError("the workers ended without a result", fix="see the workers' output above")
    return result


def _blame(failures: dict[int, RayError], others: dict[Any, int]) -> Exception:
    """What to raise for the rank that failed first in the chain.

    A dead rank comes first, then one that raised an error of ours, then one that raised anything but the loss of a
    peer's connection.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while others and time.monotonic() < deadline:
        ready, _ = ray.wait(list(others), num_returns=1, timeout=_POLL_SECONDS / 4)
        for stream in ready:
            try:
                ray.get(next(stream))
            except StopIteration:
                del others[stream]
            except RayError as another:
                failures[others.pop(stream)] = another
    for rank, failure in failures.items():
        if isinstance(failure, RayActorError | ActorUnavailableError):
            return WorkerLostError(f"training worker {rank} died ({_first_line(failure)})")
    causes = {rank: getattr(failure, "cause", failure) for rank, failure in failures.items()}
    for cause in causes.values():
        if isinstance(cause, PosttrainError):
            return cause
    rank = next((rank for rank, cause in causes.items() if not _is_victim(cause)), next(iter(causes)))
    return TrainingError(
        f"training worker {rank} failed: {type(causes[rank]).__name__}: {_first_line(causes[rank])}",
        where=f"rank {rank}",
        got=f"\n{failures[rank]}" if isinstance(failures[rank], RayTaskError) else failures[rank],
        fix="see the worker's traceback above",
    )


def _is_victim(cause: BaseException) -> bool:
    return type(cause).__name__ in _VICTIM_TYPES or any(text in str(cause) for text in _VICTIM_TEXTS)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
