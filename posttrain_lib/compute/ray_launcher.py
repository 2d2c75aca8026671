"""A training job on Ray: N identical actors, a driver that only listens.

Driver  consumes: the ranks' reports, as results of calls. Produces: rank 0's reports for the caller.
        Waits for: any rank, a second at a time, so that Ctrl-C and a step's time limit get through.
Actor   runs the whole loop of one rank. Waits for: its peers, in collectives. Unblocked by: them, or their death.

A lost actor (killed, hung, its node gone) fails its peers' collectives; all are stopped and started again from the
last checkpoint. Anything an actor raised itself is the user's to see and is not tried again.

Rank 0 is called again and again, each time for a moment; the others once, for the whole run. Calls wait in line at
the actor, so none of them makes it pause; and unlike a stream of results they also go through ``ray://``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError

from posttrain_lib.compute.heart import Watchdog, ask_all_to_stop, clear, write_driver_pulse
from posttrain_lib.compute.logs import Tail, log_path, logs_folder, redirect
from posttrain_lib.compute.memory import KillEvidence
from posttrain_lib.compute.rank import on_signals, run_rank
from posttrain_lib.compute.ray_failures import WorkerLostError, first_cause
from posttrain_lib.compute.ray_placement import START_SECONDS, actor_resources, free_address, place, unit_of
from posttrain_lib.compute.ray_session import RaySession, ray_session
from posttrain_lib.errors import TrainingError
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training import pulse
from posttrain_lib.training.job import TrainJob

if TYPE_CHECKING:
    from posttrain_lib.config.compute import ComputeConfig
    from posttrain_lib.training.loop import Events

_POLL_SECONDS = 0.5
#: of one call to rank 0: how long it collects reports
_CALL_SECONDS = 0.25
#: calls in line at rank 0
_CALLS = 2

#: one attempt at a job: (job, compute, session, what a rank reserves, whether it follows on a loss) -> its events
Attempt = Callable[[TrainJob, "ComputeConfig", RaySession, dict[str, float], bool], "Events"]


class TrainingWorker:
    """One rank, as an actor."""

    def __init__(self, work_dir: str, rank: int) -> None:
        redirect(Path(work_dir), rank)
        self._events: Iterator[StepReport] | None = None
        self._result: TrainResult | None = None
        self._failure: BaseException | None = None

    def rendezvous(self, private: bool) -> str:
        """A free ``host:port`` of this actor's node, for rank 0 to listen on; loopback if all ranks are on one."""
        return free_address(private=private)

    def begin(self, job: TrainJob, stop_signals: list[str]) -> None:
        """Take the orders."""
        self._events = run_rank(job, stop_signals)

    def advance(self, seconds: float | None) -> tuple[list[StepReport], TrainResult | None]:
        """Train until a report comes ``seconds`` or more from now; without ``seconds`` to the end, reporting nothing.

        Returns the reports, and the result once there is one. What the loop raised comes with the next call where
        there were reports before it: they must not be lost with it.
        """
        assert self._events is not None, "begin comes first"
        reports: list[StepReport] = []
        begun = time.monotonic()
        while self._result is None:
            if self._failure is not None:
                raise self._failure
            try:
                report = next(self._events)
            except StopIteration as stop:
                self._result = stop.value
                break
            except BaseException as failure:
                self._failure = failure
                if reports:
                    break
                continue
            if seconds is not None:
                reports.append(report)
                if time.monotonic() - begun >= seconds or report.step == 0:
                    break
        return reports, self._result


def launch_on_ray(job: TrainJob, compute: ComputeConfig, attempt_with: Attempt | None = None) -> Events:
    """Run ``job.world`` ranks as actors, restarting them from the last checkpoint when one is lost.

    On a cluster, the job's folders must be on storage that every node sees. ``attempt_with`` runs the job once on an
    open session, where its driver does more than listen.

    Raises:
        TrainingError: a rank was lost more than ``compute.retries`` times, or ran out of memory; or whatever
            :class:`PosttrainError` a rank raised.
        PreemptedError: stopped by a signal to the driver or a rank, behind a checkpoint.
        ConfigError: no cluster at the address, or fewer GPUs than workers where ``device`` asks for them.
    """
    cores = max(job.world, len(os.sched_getaffinity(0)))
    work = Path(job.work_dir)
    unit: dict[str, float] = {}
    for attempt in range(compute.retries + 1):
        pulse.begin()
        pulse.beat("Ray")
        try:
            # A session of its own for each attempt: whatever killed a worker may have hurt Ray as well.
            with ray_session(work, compute.address, cores) as session:
                clear(work)  # before signals are heard: what they ask for is left there
                with on_signals(compute.stop_signals, lambda name: ask_all_to_stop(work, f"the driver got {name}")):
                    unit = unit or unit_of(job)  # of the first attempt: what was lost since must not change it
                    return (yield from (attempt_with or _run_once)(job, compute, session, unit, attempt > 0))
        except WorkerLostError as lost:
            if attempt == compute.retries:
                raise TrainingError(
                    f"a training worker was lost {attempt + 1} times",
                    where=str(lost),
                    expected=f"at most {compute.retries} losses (compute.retries)",
                    fix=f"look at the ranks' logs in {logs_folder(work)} and for an out-of-memory kill in the system "
                    "log. Running again goes on from the last checkpoint",
                ) from lost
            print(f"{lost}; starting again from the last checkpoint", flush=True)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _run_once(
    job: TrainJob, compute: ComputeConfig, session: RaySession, unit: dict[str, float], after_loss: bool
) -> Events:
    work = Path(job.work_dir)
    evidence = KillEvidence()
    actor = ray.remote(max_restarts=0, max_task_retries=0)(TrainingWorker)
    workers: list[Any] = []
    with contextlib.ExitStack() as undo:
        placement = None
        if not session.private:
            least = compute.min_devices if after_loss else None
            placement, job = place(job, unit, compute.devices_per_node, least)
            undo.callback(placement.give_back)
        undo.callback(_kill, workers)
        pulse.beat("actors")
        for rank in range(job.world):
            options = actor_resources(unit) if placement is None else placement.options(rank)
            workers.append(actor.options(**options).remote(job.work_dir, rank))
        rendezvous = _first_contact(workers, private=session.private)
        session.record()
        pulse.beat("ranks")
        write_driver_pulse(work)
        for rank, worker in enumerate(workers):
            orders = dataclasses.replace(job, rank=rank, rendezvous=rendezvous)
            worker.begin.remote(orders, list(compute.stop_signals))
        return (yield from _listen(workers, job, evidence, compute.hang_seconds))


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        if ray.is_initialized():
            ray.kill(worker)


def _first_contact(workers: list[Any], *, private: bool) -> str:
    """Wait until every actor answers; rank 0's answer is the rendezvous."""
    answers = [worker.rendezvous.remote(private) for worker in workers]
    deadline = time.monotonic() + START_SECONDS
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
        raise WorkerLostError(f"a training worker died while starting ({str(error).strip()})") from error


def _listen(workers: list[Any], job: TrainJob, evidence: KillEvidence, hang_seconds: float) -> Events:
    """Pass on what rank 0 reports and prints until all ranks have ended."""
    calls = {worker.advance.remote(None): rank for rank, worker in enumerate(workers) if rank > 0}
    calls.update({workers[0].advance.remote(_CALL_SECONDS): 0 for _ in range(_CALLS)})
    result: TrainResult | None = None
    words = Tail(log_path(Path(job.work_dir), 0))
    dog = Watchdog(Path(job.work_dir), hang_seconds)
    try:
        while calls:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_SECONDS)
            for call in ready:
                rank = calls.pop(call)
                try:
                    reports, ended = ray.get(call)
                except RayError as error:
                    late: list[tuple[list[StepReport], TrainResult | None]] = []
                    cause = first_cause({rank: error}, calls, job, evidence, late)
                    for reports, _ in late:
                        yield from reports
                    raise cause from None
                _print(words)
                yield from reports
                if rank == 0 and ended is None:
                    calls[workers[0].advance.remote(_CALL_SECONDS)] = 0
                result = ended or result
            _print(words)
            if (hung := dog.check()) is not None:
                raise WorkerLostError(hung)
    finally:
        _print(words)
    assert result is not None, "a rank ends with its result or with an error"
    return result


def _print(words: Tail) -> None:
    for line in words.lines():
        print(line, flush=True)
