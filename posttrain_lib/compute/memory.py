"""Out of memory, in words that say what to lower; and the traces that the kernel's own kill leaves."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain_lib.errors import TrainingError
from posttrain_lib.training import pulse

if TYPE_CHECKING:
    from posttrain_lib.training.job import TrainJob

#: what torch's allocators say besides the error types of their own
_TEXTS = re.compile(r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_errors(job: TrainJob) -> Iterator[None]:
    """Turn an allocator's failure into a TrainingError that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = next(iter(str(error).strip().splitlines()), "MemoryError")
        now = pulse.current()
        where = f"rank {job.rank}, step {now.step}, {now.phase}"
        raise out_of_memory(job, where=where, got=first, phase=now.phase) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator said no: Python's, torch's on the CPU, or the device's (a RuntimeError of torch)."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_TEXTS.search(str(error))))


def out_of_memory(job: TrainJob, *, where: str, got: str, phase: str) -> TrainingError:
    """The error, with what to lower in order of effect in that ``phase`` of a rank's pulse."""
    return TrainingError(
        "training ran out of memory",
        where=where,
        got=got,
        fix="; ".join(remedies(job, phase)) + ". Running again then goes on from the last checkpoint",
    )


def remedies(job: TrainJob, phase: str) -> list[str]:
    """What to lower, first what helps most; what is at its least already is left out.

    While the model is made, weights and optimiser fill the memory, later what the backward pass needs does.
    """
    train = job.train
    activations = []
    if train.micro_batch_rows > 1:
        activations.append(f"lower train.micro_batch_rows (now {train.micro_batch_rows})")
    activations.append(f"lower train.row_tokens (now {train.row_tokens}), or split rows with compute.mesh.context")
    if train.activation_checkpointing != "full":
        activations.append(f"set train.activation_checkpointing: full (now {train.activation_checkpointing})")
    states = [f"share weights over more devices (compute.mesh.shard, now {job.mesh.shard})"]
    if job.lora is None:
        states.append("train adapters (model.lora) in place of all weights")
    return states + activations if phase == "model" else activations + states


class KillEvidence:
    """Whether the kernel killed for memory since this was made: its counters in the cgroup of this process.

    ``root``: where cgroups are mounted; ``membership``: the file that says which this process is in.
    """

    def __init__(self, root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> None:
        self._files = list(_counters(root, membership))
        self._before = self._counts()

    def found(self) -> str | None:
        """What was found, in words; None: nothing, or nothing that may be read."""
        for path, count in self._counts().items():
            if count > self._before.get(path, 0):
                return f"the kernel killed {count - self._before.get(path, 0)} for memory ({path}: oom_kill {count})"
        return None

    def _counts(self) -> dict[Path, int]:
        found = {}
        for path in self._files:
            with contextlib.suppress(OSError):
                if match := re.search(r"^oom_kill (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
                    found[path] = int(match.group(1))
        return found


def _counters(root: Path, membership: Path) -> Iterator[Path]:
    """Files with a count of kills, of cgroups in both versions; in a container its own group is the root."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            folder, name = root / "memory", "memory.oom_control"
        elif not controllers:
            folder, name = root, "memory.events"
        else:
            continue
        for path in (folder / group.lstrip("/") / name, folder / name):
            if path.is_file():
                yield path
                break
