"""Checkpoints that are whole or not there.

    step-00000120/
      __0_0.distcp, .metadata   tensors (torch.distributed.checkpoint), one file a rank; any number of ranks may load
      state.json                counters, data position, what the run is, the step's report
      rng-0.json ...            random generators, one a rank
      manifest.json             format version, size and sha256 of every other file: written last

A checkpoint is written in a folder whose name starts with a dot and gets its name by one rename. Which step was best
is part of each checkpoint's own counters, so no second file can disagree with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from posttrain_lib.errors import CheckpointError
from posttrain_lib.lineage.digests import digest_file, list_files, sync_folder, write_atomically
from posttrain_lib.parallel.process_group import barrier, from_first_rank, gather_objects, world_size
from posttrain_lib.training.device import rng_state, set_rng_state

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain_lib.training.state import TrainState

#: 2: parameters have the names that all families share (norms by their place)
FORMAT_VERSION = 2
MANIFEST, STATE = "manifest.json", "state.json"


def step_folder(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class CheckpointManager:
    """Saves, finds and loads the checkpoints of one job. Every rank calls every method.

    ``say`` gets the sentences that a person should read (a damaged checkpoint was passed over), on every rank.
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
        self._together(target, lambda: _make_empty(partial), everywhere=False)
        self._together(target, lambda: _write(partial, state, self.rank))
        self._together(target, lambda: _publish(partial, target), everywhere=False)
        self._together(target, self._retain, everywhere=False)
        return target

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; each damaged one on the way is named through ``say``.

        Raises:
            CheckpointError: the newest whole one is of a format newer than this code reads.
        """
        found: tuple[Path | None, list[str], CheckpointError | None] = (None, [], None)
        if self.rank == 0:  # one rank reads and hashes for all
            found = self._search()
        path, notes, error = from_first_rank(found)
        for note in notes:
            self.say(note)
        if error is not None:
            raise error
        return path

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` stands, if it does."""
        return self.folder / step_folder(step)

    def load(self, path: Path, state: TrainState) -> None:
        """Fill ``state`` from a checkpoint that :meth:`newest` found good, whatever number of ranks wrote it.

        Random generators come back only where as many ranks wrote it as read it; the data position always does.

        Raises:
            CheckpointError: it is of another run (other train section or data), or of another model or optimiser.
        """
        raw = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, value in state.trajectory.items():
            if raw["trajectory"].get(name) != value:
                raise CheckpointError(
                    f"the checkpoint is of another run: {name} differs",
                    where=path,
                    got=raw["trajectory"].get(name),
                    expected=value,
                    fix="restore that value, or start anew with an empty work folder",
                )
        tensors = state.tensors()
        try:
            with _one_process_is_fine():
                dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
            raise CheckpointError(
                "the checkpoint does not fit this model and optimiser", where=path, got=_root_cause(error)
            ) from error
        state.load_tensors(tensors)
        state.loader.load_state(raw["loader"])
        state.progress = type(state.progress)(**raw["progress"])
        state.report = raw["report"]
        if raw["world"] == world_size():
            set_rng_state(json.loads((path / f"rng-{self.rank}.json").read_text(encoding="utf-8")))

    def _search(self) -> tuple[Path | None, list[str], CheckpointError | None]:
        for leftover in self.folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        notes: list[str] = []
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                problem = damage(path)
            except CheckpointError as error:
                return None, notes, error
            if problem is None:
                return path, notes, None
            notes.append(f"skipped checkpoint {path.name}: {problem}")
        return None, notes, None

    def _together(self, target: Path, work: Callable[[], None], *, everywhere: bool = True) -> None:
        """Do a part of a save on every rank, or on rank 0 alone; if it failed on any, clean up and fail on all."""
        failure: str | None = None
        try:
            if everywhere or self.rank == 0:
                work()
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            # torch reports a full disk as RuntimeError or wraps it; every rank must hear of it before one raises
            failure = f"rank {self.rank}: {_root_cause(error)}"
        failures = [item for item in gather_objects(failure) if item]
        if not failures:
            return
        if self.rank == 0:
            shutil.rmtree(target.with_name(f".{target.name}.partial"), ignore_errors=True)
        barrier()
        raise CheckpointError(
            "the checkpoint could not be written; those before it are untouched",
            where=target,
            got="; ".join(failures),
            fix="free space or point POSTTRAIN_STORE at a larger disk; the run then goes on from the last checkpoint",
        )

    def _retain(self) -> None:
        """Keep the newest ``keep_last``, and whichever checkpoint each of those calls the best."""
        paths = sorted(self.folder.glob("step-*"))
        kept = set(paths[-self.keep_last :])
        for path in list(kept):
            step = _best_step(path)
            if step is not None:
                kept.add(self.path(step))
        for path in paths:
            if path not in kept:
                shutil.rmtree(path)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Reads them all: a flipped bit must not train on.

    Raises:
        CheckpointError: it is of another format than this code reads.
    """
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        version, files = content["format_version"], content["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint is of {'a newer' if version > FORMAT_VERSION else 'an older'} format",
            where=path,
            got=version,
            expected=FORMAT_VERSION,
            fix="read it with the version of this project that wrote it",
        )
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
        if digest_file(file) != digest:
            return f"{name} has another sha256"
    return None


def load_model_state(path: str | Path) -> dict[str, Tensor]:
    """Whole float32 weights of a checkpoint on the CPU, by our parameter names; in one process, whatever wrote it.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    path = Path(path)
    problem = damage(path)
    if problem is not None:
        raise CheckpointError("the checkpoint is damaged", where=path, got=problem, fix="use another checkpoint")
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = "model."
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with _one_process_is_fine():
        dcp.load(wanted, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in wanted.items()}


@contextlib.contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """torch warns at every save and load without a process group, even where ``no_dist`` says that it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write(folder: Path, state: TrainState, rank: int) -> None:
    with _one_process_is_fine():
        dcp.save(state.tensors(), checkpoint_id=folder, no_dist=not dist.is_initialized())
    _write_json(folder / f"rng-{rank}.json", rng_state())
    if rank == 0:
        content: dict[str, Any] = {
            "progress": dataclasses.asdict(state.progress),
            "trajectory": state.trajectory,
            "loader": state.loader.state(),
            "report": state.report,
            "world": world_size(),
        }
        _write_json(folder / STATE, content)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _publish(partial: Path, target: Path) -> None:
    """Flush every file, write the manifest, rename: a manifest on the disk means files on the disk."""
    files: dict[str, tuple[int, str]] = {}
    for path in list_files(partial):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        files[path.relative_to(partial).as_posix()] = (path.stat().st_size, digest_file(path))
    write_atomically(partial / MANIFEST, json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1))
    sync_folder(partial)
    if target.exists():  # a damaged one that was passed over when this run resumed
        shutil.rmtree(target)
    os.rename(partial, target)
    sync_folder(target.parent)


def _best_step(path: Path) -> int | None:
    """Which step a checkpoint calls the best; None too where it is damaged, which then keeps nothing alive."""
    try:
        step = json.loads((path / STATE).read_text(encoding="utf-8"))["progress"]["best_step"]
    except (OSError, ValueError, KeyError):
        return None
    return None if step is None else int(step)


def _root_cause(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        causes = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
        return "; ".join(dict.fromkeys(str(cause) for cause in causes))
    return str(error)
