"""Policy and reference over Ray actors, through verl's single controller.

    controller --TrainSample--> VerlPolicy --DataProto--> RayWorkerGroup --> PolicyWorker x N, a rank of the policy each
                                     <--reports, log-probabilities, chunks of weights: of rank 0--

The driver waits for a call's ranks half a second at a time. Where one fails, the error that is raised is that of the
rank that failed first (``compute.ray_failures``), and no rank is asked again.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

from posttrain_lib.adapters.verl_samples import to_proto
from posttrain_lib.adapters.verl_worker import PolicyWorker
from posttrain_lib.compute.logs import Tail, log_path
from posttrain_lib.compute.memory import KillEvidence
from posttrain_lib.compute.ray_failures import first_cause
from posttrain_lib.compute.ray_placement import START_SECONDS
from posttrain_lib.errors import TrainingError
from posttrain_lib.rl.weight_chunks import Chunk, from_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain_lib.schema.reports import StepReport, TrainResult
    from posttrain_lib.schema.rollouts import TrainSample
    from posttrain_lib.training.job import TrainJob

_POLL_SECONDS = 0.5
#: of weights that are on their way at once, in chunks of so many bytes: less than the smallest object store of Ray
_CHUNK_BYTES, _CHUNKS_AHEAD = 16 * 2**20, 2


class _Group(RayWorkerGroup):
    """verl's group, without the process that it starts to find an address for a process group of its own."""

    def _get_master_addr_port(self, *args: Any, **kwargs: Any) -> None:
        self._master_addr = self._master_port = "unused"


class VerlWorkers:
    """The actors of a job, one for each rank of its mesh; asked alike, one question at a time.

    Args:
        unit: what Ray reserves for a rank (``ray_placement.unit_of``). per_node: ranks of a node.
        private: this process started that Ray, and all is on one machine.

    Raises:
        TrainingError: Ray has no room in time, or memory ran out. ConfigError, ModelError: what a rank raised.
        WorkerLostError: a rank died.
    """

    def __init__(self, job: TrainJob, unit: dict[str, float], per_node: int, *, private: bool) -> None:
        self.job = job
        self._evidence = KillEvidence()
        self._words = Tail(log_path(Path(job.work_dir), 0))
        self._sound = True
        self._rooms: list[PlacementGroup] = []
        try:
            self._group = self._start(unit, per_node)
            rendezvous = self.ask("address", private)
            self.ask("make", job, rendezvous)
        except BaseException:
            self._sound = False
            self.close()
            raise

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of every rank; rank 0's answer."""
        return self.answer(self.begin(method, *args))

    def begin(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank and do not wait: what :meth:`answer` takes."""
        calls: list[Any] = getattr(self._group, method)(*args)
        return calls

    def answer(self, calls: list[Any]) -> Any:
        """Rank 0's answer, once every rank has one."""
        waiting = {call: rank for rank, call in enumerate(calls)}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_POLL_SECONDS)
            for call in ready:
                rank = waiting.pop(call)
                try:
                    ray.get(call)
                except RayError as error:
                    self._sound = False
                    raise first_cause({rank: error}, waiting, self.job, self._evidence, []) from None
                finally:
                    self._print()
        return ray.get(calls[0])

    def close(self) -> None:
        """End every actor; where none has failed, behind the checkpoint that is being written."""
        try:
            if self._sound:
                self.ask("close")
        finally:
            self._sound = False
            if ray.is_initialized():
                for room in self._rooms:
                    remove_placement_group(room)  # with what runs in it
            self._rooms = []

    def _start(self, unit: dict[str, float], per_node: int) -> RayWorkerGroup:
        on_gpu = "GPU" in unit
        sizes = [per_node] * (self.job.world // per_node)
        # Made here: verl's pool would wait for ever for room that Ray does not have.
        self._rooms = [placement_group([dict(unit)] * size, strategy="STRICT_PACK") for size in sizes]
        deadline = time.monotonic() + START_SECONDS
        for room in self._rooms:
            while not room.wait(_POLL_SECONDS):
                if time.monotonic() > deadline:
                    raise TrainingError(
                        "Ray has no room for the policy",
                        where=f"{len(sizes)} nodes with {per_node} x {unit} each",
                        got=f"{ray.available_resources()} free",
                        fix="wait for the cluster to be free, or ask for fewer devices",
                    )
        pool = RayResourcePool(sizes, use_gpu=on_gpu, max_colocate_count=1)
        pool.pgs = self._rooms
        actor = ray.remote(max_restarts=0, max_task_retries=0)(PolicyWorker)
        made = RayClassWithInitArgs(actor, self.job.work_dir)
        # Named here: verl draws names from the random numbers that a job seeds, so two attempts would have the same.
        name = f"policy-{uuid.uuid4().hex}-"
        device = "cuda" if on_gpu else "cpu"
        return _Group(resource_pool=pool, ray_cls_with_init=made, device_name=device, name_prefix=name)

    def _print(self) -> None:
        for line in self._words.lines():
            print(line, flush=True)


class VerlPolicy:
    """The policy over actors (``rl.roles.PolicyRole``). It closes the actors."""

    def __init__(self, workers: VerlWorkers) -> None:
        self.workers = workers
        self._version = 0

    @property
    def version(self) -> int:
        """Updates so far."""
        return self._version

    def resume(self) -> tuple[dict[str, Any], StepReport] | None:
        """Go to the newest good checkpoint."""
        found: tuple[dict[str, Any], StepReport] | None = self.workers.ask("resume")
        if found is not None:
            self._version = found[1].step
        return found

    def update(self, samples: Sequence[TrainSample]) -> StepReport:
        """One optimiser step."""
        report: StepReport = self.workers.ask("update", ray.put(to_proto(samples)))
        self._version = report.step
        return report

    def logprobs(self, samples: Sequence[TrainSample], *, temperature: float | None = None) -> list[np.ndarray]:
        """Float32 [N] for each sample."""
        return _logprobs(self.workers, "logprobs", samples, temperature)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """By Hugging Face name, on the CPU, chunk after chunk."""
        return from_chunks(self._chunks())

    def save(self, controller: dict[str, Any], report: StepReport, *, wait: bool = False) -> None:
        """A checkpoint of this version."""
        self.workers.ask("save", controller, report, wait)

    def result(self) -> TrainResult:
        """What the run came to."""
        found: TrainResult = self.workers.ask("result")
        return found

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and end the actors."""
        self.workers.close()

    def _chunks(self) -> Iterator[Chunk]:
        workers = self.workers
        workers.ask("begin_weights", _CHUNK_BYTES)
        coming = deque(workers.begin("next_weights") for _ in range(_CHUNKS_AHEAD))
        while (chunk := workers.answer(coming.popleft())) is not None:
            coming.append(workers.begin("next_weights"))
            yield chunk


class VerlReference:
    """The frozen model on the policy's actors (``rl.roles.ReferenceRole``)."""

    def __init__(self, workers: VerlWorkers) -> None:
        self.workers = workers

    def logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Float32 [N] for each sample."""
        return _logprobs(self.workers, "reference_logprobs", samples)

    def close(self) -> None:
        """Nothing: the actors are the policy's."""


@contextlib.contextmanager
def verl_models(workers: VerlWorkers) -> Iterator[tuple[VerlPolicy, VerlReference | None]]:
    """The policy, and the reference if the job has one; the actors end with it."""
    rollouts = workers.job.rollouts
    assert rollouts is not None, "a job of rollouts"
    with contextlib.closing(VerlPolicy(workers)) as policy:
        yield policy, None if rollouts.frozen is None else VerlReference(workers)


def _logprobs(workers: VerlWorkers, method: str, samples: Sequence[TrainSample], *options: Any) -> list[np.ndarray]:
    if not samples:
        return []
    found = workers.ask(method, ray.put(to_proto(samples)), *options)
    # Copied: what Ray gives is read-only, and holds room in its object store.
    return [np.array(each) for each in found]
