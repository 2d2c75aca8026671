"""Checkpoints that are whole or not there.

    step-00000120/
      __0_0.distcp, .metadata   tensors (torch.distributed.checkpoint), one file a rank; any number of ranks may load
      state.json                counters, data position
      rng-0.pt ...              random generators, one a rank
      manifest.json             format version, size and sha256 of every other file: written last

A checkpoint is written in a folder whose name starts with a dot and gets its name by one rename. ``best.json`` beside
them names the step with the lowest held-out loss.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from posttrain_lib.errors import CheckpointError
from posttrain_lib.lineage.digests import digest_file, list_files, write_atomically
from posttrain_lib.parallel.process_group import barrier, gather_objects
from posttrain_lib.training.device import rng_state, set_rng_state

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain_lib.training.state import TrainState

FORMAT_VERSION = 1
MANIFEST, STATE, BEST = "manifest.json", "state.json", "best.json"


def step_folder(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class CheckpointManager:
    """Saves, finds and loads the checkpoints of one job. Every rank calls every method.

    ``say`` gets the sentences that a person should read (a damaged checkpoint was passed over).
    """

    folder: Path
    keep_last: int
    rank: int = 0
    say: Callable[[str], None] = print

    def save(self, state: TrainState) -> Path:
        """Write the checkpoint of ``state.progress.step`` and drop those that retention no longer wants.

        Raises:
            CheckpointError: the disk said no, on any rank; earlier checkpoints are untouched, the torn one is removed.
        """
        target = self.folder / step_folder(state.progress.step)
        partial = target.with_name(f".{target.name}.partial")
        failure: str | None = None
        try:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            barrier()
            _write(partial, state, self.rank)
        except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
            # torch reports a full disk as RuntimeError or wraps it; every rank must hear of it before raising
            failure = f"rank {self.rank}: {_root_cause(error)}"
        self._agree(failure, partial, target)
        try:
            if self.rank == 0:
                _seal(partial)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(partial, target)
        except OSError as error:
            failure = f"rank 0: {error}"
        self._agree(failure, partial, target)
        if self.rank == 0:
            self._mark_best(state)
            self._retain(state)
        barrier()
        return target

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; each damaged one on the way is named through ``say``."""
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            problem = damage(path)
            if problem is None:
                return path
            if self.rank == 0:
                self.say(f"checkpoint {path} is damaged ({problem}); trying the one before it")
        return None

    def best(self) -> Path | None:
        """The checkpoint with the lowest held-out loss, None before the first evaluation."""
        path = self.folder / BEST
        if not path.is_file():
            return None
        return self.folder / step_folder(json.loads(path.read_text(encoding="utf-8"))["step"])

    def load(self, path: Path, state: TrainState) -> None:
        """Fill ``state`` from a checkpoint, whatever number of ranks wrote it.

        Random generators come back only where as many ranks wrote it as read it; the data position always does.

        Raises:
            CheckpointError: it is damaged, of a newer format, or of other data.
        """
        problem = damage(path)
        if problem is not None:
            raise CheckpointError("the checkpoint is damaged", where=path, got=problem, fix="use an earlier one")
        raw = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = state.tensors()
        dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        state.load_tensors(tensors)
        state.loader.load_state(raw["loader"])
        state.progress = type(state.progress)(**raw["progress"])
        world = dist.get_world_size() if dist.is_initialized() else 1
        if raw["world"] == world:
            set_rng_state(torch.load(path / f"rng-{self.rank}.pt", weights_only=False))

    def _agree(self, failure: str | None, partial: Path, target: Path) -> None:
        failures = [item for item in gather_objects(failure) if item]
        if not failures:
            return
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            "the checkpoint could not be written; those before it are untouched",
            where=target,
            got="; ".join(failures),
            fix="free space or point POSTTRAIN_STORE at a larger disk; the run then goes on from the last checkpoint",
        )

    def _mark_best(self, state: TrainState) -> None:
        if state.progress.best_step == state.progress.step:
            write_atomically(self.folder / BEST, json.dumps({"step": state.progress.best_step}))

    def _retain(self, state: TrainState) -> None:
        best = self.best()
        for path in sorted(self.folder.glob("step-*"))[: -self.keep_last]:
            if path != best:
                shutil.rmtree(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Reads them all: a flipped bit must not train on.

    Raises:
        CheckpointError: it is whole, but of a format newer than this code reads.
    """
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    if content["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            "the checkpoint is of a newer format",
            where=path,
            got=content["format_version"],
            expected=f"at most {FORMAT_VERSION}",
            fix="read it with the version of this project that wrote it",
        )
    for name, (size, digest) in content["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        if digest_file(file) != digest:
            return f"{name} does not have its sha256"
    return None


def load_model_state(path: str | Path) -> dict[str, Tensor]:
    """Whole weights of a checkpoint on the CPU, by our parameter names; in one process, whatever wrote it.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    path = Path(path)
    problem = damage(path)
    if problem is not None:
        raise CheckpointError("the checkpoint is damaged", where=path, got=problem)
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = "model."
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(prefix)
    }
    dcp.load(wanted, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in wanted.items()}


def _write(folder: Path, state: TrainState, rank: int) -> None:
    dcp.save(state.tensors(), checkpoint_id=folder, no_dist=not dist.is_initialized())
    torch.save(rng_state(), folder / f"rng-{rank}.pt")
    if rank == 0:
        content: dict[str, Any] = {
            "progress": dataclasses.asdict(state.progress),
            "loader": state.loader.state(),
            "world": dist.get_world_size() if dist.is_initialized() else 1,
        }
        (folder / STATE).write_text(json.dumps(content), encoding="utf-8")


def _seal(folder: Path) -> None:
    """Flush every file, then write the manifest, so that a manifest on the disk means files on the disk."""
    files: dict[str, tuple[int, str]] = {}
    for path in list_files(folder):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        files[path.relative_to(folder).as_posix()] = (path.stat().st_size, digest_file(path))
    write_atomically(folder / MANIFEST, json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1))


def _root_cause(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        causes = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
        return "; ".join(str(cause) for cause in causes)
    return str(error)
