"""A rank of policy and reference as an actor of verl's worker groups."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register

from posttrain_lib.adapters.verl_samples import from_proto
from posttrain_lib.compute.heart import Heart
from posttrain_lib.compute.logs import redirect
from posttrain_lib.compute.memory import memory_errors
from posttrain_lib.compute.ray_placement import free_address
from posttrain_lib.rl.ranks import models_here
from posttrain_lib.rl.weight_chunks import Chunk, in_chunks
from posttrain_lib.training.device import pick_device, reproducible

if TYPE_CHECKING:
    import numpy as np

    from posttrain_lib.rl.policy import PolicyRank
    from posttrain_lib.rl.reference import FrozenReference
    from posttrain_lib.schema.reports import StepReport, TrainResult
    from posttrain_lib.training.job import TrainJob


def on_every_rank(method: Callable[..., Any]) -> Callable[..., Any]:
    """Called with the same arguments on every rank, without waiting; the answer is rank 0's, None elsewhere."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    @functools.wraps(method)
    def run(worker: PolicyWorker, *args: Any) -> Any:
        with contextlib.nullcontext() if worker.job is None else memory_errors(worker.job):
            answer = method(worker, *args)
        return answer if worker.rank == 0 else None

    return run


class PolicyWorker(Worker):
    """One rank: what ``rl.roles.PolicyRole`` and ``ReferenceRole`` say, with samples as DataProto."""

    def __init__(self, work_dir: str) -> None:
        super().__init__()
        redirect(Path(work_dir), self.rank)
        self.job: TrainJob | None = None
        self._entered = contextlib.ExitStack()
        self._policy: PolicyRank
        self._reference: FrozenReference | None = None
        self._chunks: Iterator[Chunk] = iter(())

    @on_every_rank
    def address(self, private: bool) -> str:
        """Where rank 0 can listen."""
        return free_address(private=private)

    @on_every_rank
    def make(self, job: TrainJob, rendezvous: str) -> None:
        """Join the others, and load policy and reference."""
        self.job = job = dataclasses.replace(job, rank=self.rank, rendezvous=rendezvous)
        enter = self._entered.enter_context
        enter(Heart(Path(job.work_dir), job.rank, job.world))
        device = pick_device(job.device, job.rank)
        enter(reproducible(job.train.seed, job.threads))
        self._policy, self._reference = enter(models_here(job, device, print))

    @on_every_rank
    def resume(self) -> tuple[dict[str, Any], StepReport] | None:
        """Of the policy."""
        return self._policy.resume()

    @on_every_rank
    def update(self, samples: DataProto) -> StepReport:
        """Of the policy."""
        return self._policy.update(from_proto(samples))

    @on_every_rank
    def logprobs(self, samples: DataProto, temperature: float | None) -> list[np.ndarray]:
        """Of the policy."""
        return self._policy.logprobs(from_proto(samples), temperature=temperature)

    @on_every_rank
    def reference_logprobs(self, samples: DataProto) -> list[np.ndarray]:
        """Of the reference."""
        assert self._reference is not None, "the job names a reference"
        return self._reference.logprobs(from_proto(samples))

    @on_every_rank
    def begin_weights(self, most: int) -> None:
        """Begin with the policy's weights, in chunks of at most ``most`` bytes."""
        self._chunks = in_chunks(self._policy.weights(), most, sends=self.rank == 0)

    @on_every_rank
    def next_weights(self) -> Chunk | None:
        """The next chunk; None behind the last. Every rank is asked, because sharded weights are gathered."""
        return next(self._chunks, None)

    @on_every_rank
    def save(self, controller: dict[str, Any], report: StepReport, wait: bool) -> None:
        """Of the policy."""
        self._policy.save(controller, report, wait=wait)

    @on_every_rank
    def result(self) -> TrainResult:
        """Of the policy."""
        return self._policy.result()

    @on_every_rank
    def close(self) -> None:
        """Wait for the checkpoint that is being written, and leave the others."""
        self._entered.close()
