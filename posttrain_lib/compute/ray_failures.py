"""Which of several failed ranks is to blame, and how that is said."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from posttrain_lib.compute.heart import read_pulses
from posttrain_lib.compute.logs import last_lines, logs_folder
from posttrain_lib.compute.memory import KillEvidence, out_of_memory
from posttrain_lib.errors import PosttrainError, TrainingError
from posttrain_lib.training.job import TrainJob

#: after the first failure, how long to listen for the others: the first heard is often only a victim
_SETTLE_SECONDS = 5.0
_POLL_SECONDS = 0.25
#: what a rank says whose peer has gone
_VICTIM_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_VICTIM_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class WorkerLostError(Exception):
    """A rank's process died or hung; the job can go on from its last checkpoint."""


def first_cause(
    failures: dict[int, RayError],
    others: dict[Any, int],
    job: TrainJob,
    evidence: KillEvidence,
    late: list[Any],
) -> Exception:
    """What to raise for the rank that failed first in the chain; its traceback is printed before.

    A dead rank comes first, then one that raised an error of ours, then one that raised anything but the loss of a
    peer's connection. ``others`` are the calls of ranks that have not been heard of yet; ``late`` gets what they still
    answer.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while others and time.monotonic() < deadline:
        ready, _ = ray.wait(list(others), num_returns=1, timeout=_POLL_SECONDS)
        for call in ready:
            rank = others.pop(call)
            try:
                late.append(ray.get(call))
            except RayError as another:
                failures.setdefault(rank, another)
    for rank, failure in failures.items():
        if isinstance(failure, RayActorError | ActorUnavailableError):
            return _death(rank, failure, job, evidence)
    causes = {rank: getattr(failure, "cause", failure) for rank, failure in failures.items()}
    for cause in causes.values():
        if isinstance(cause, PosttrainError):
            return cause
    rank = next((rank for rank, cause in causes.items() if not _is_victim(cause)), next(iter(causes)))
    _show(f"rank {rank} failed", str(failures[rank]))
    return TrainingError(
        f"training worker {rank} failed: {type(causes[rank]).__name__}: {_first_line(causes[rank])}",
        where=_place(job, rank),
        fix=f"see its traceback above; what every rank printed is in {logs_folder(Path(job.work_dir))}",
    )


def _death(rank: int, failure: RayError, job: TrainJob, evidence: KillEvidence) -> Exception:
    """A rank's process is gone: for memory, which would happen again, or for anything else."""
    work = Path(job.work_dir)
    if said := last_lines(work, rank):
        _show(f"the last words of rank {rank}", said)
    text = str(failure)
    killed = evidence.found()
    if killed is None and ("OutOfMemory" in text or "memory monitor" in text):
        killed = _first_line(failure)
    if killed is not None:
        phase = str(read_pulses(work).get(rank, {}).get("phase", ""))
        return out_of_memory(job, where=_place(job, rank), got=killed, phase=phase)
    return WorkerLostError(f"training worker {rank} died ({_place(job, rank)}; {_first_line(failure)})")


def _place(job: TrainJob, rank: int) -> str:
    """The rank, and where its pulse was last."""
    last = read_pulses(Path(job.work_dir)).get(rank)
    return f"rank {rank}" if last is None else f"rank {rank} on {last['host']}, step {last['step']}, {last['phase']}"


def _show(heading: str, text: str) -> None:
    plain = re.sub(r"\x1b\[\d+m", "", text.rstrip())  # Ray colours its own lines
    print(f"--- {heading}:\n{plain}\n---", file=sys.stderr, flush=True)


def _is_victim(cause: BaseException) -> bool:
    return type(cause).__name__ in _VICTIM_TYPES or any(text in str(cause) for text in _VICTIM_TEXTS)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
