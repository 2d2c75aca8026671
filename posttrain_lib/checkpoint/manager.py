"""Checkpoints that are whole or not there, of any layout for any other, on a disk or in an object store.

    step-00000120/
      tensors-0.bin ...         raw little-endian bytes of each rank's shards; what several ranks have stands once
      tensors-0.json ...        which box of which tensor stands where in it, and crc32 of every chunk
      rng-0.json ...            random generators, one a rank
      state.json                counters, data position, what the run is, the optimiser's numbers, the step's report
      manifest.json             format version, size and sha256 of every other file (of the .bin: its index): last

A checkpoint is there when its manifest is: on a disk by one rename of the folder, in a store by one PUT. Which step was
best is part of each checkpoint's own counters, so no second file can disagree with them. How it is written beside the
training: ``state_saver``; how it is read: ``state_reader``.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain_lib.checkpoint.state_files import (
    MANIFEST,
    STATE,
    WRITE_BYTES,
    CheckpointFiles,
    LocalFolder,
    checkpoint_files,
    checkpoint_folder,
    step_folder,
)
from posttrain_lib.checkpoint.state_layout import as_bytes
from posttrain_lib.checkpoint.state_reader import (
    DamagedError,
    StoredTensor,
    check_chunks,
    check_fits,
    read_catalogue,
    read_tensors,
)
from posttrain_lib.checkpoint.state_saver import Ranks, Saving, Snapshot, WritePlan, reason
from posttrain_lib.checkpoint.state_writer import HostBuffer, image_file, index_file
from posttrain_lib.errors import CheckpointError, PosttrainError
from posttrain_lib.lineage.digests import digest_text
from posttrain_lib.training.device import rng_state, set_rng_state

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain_lib.training.state import TrainState

#: 2: files of torch.distributed.checkpoint. 3: this module's own
FORMAT_VERSION = 3
_MODEL = "model."
#: how long the end of a failed training waits for a save that is under way
_LAST_WAIT_SECONDS = 120.0


class CheckpointManager:
    """Saves, finds and loads the checkpoints of one job. Every rank calls every method, in the same order.

    Args:
        folder: a path, or the URL of a store's folder.
        keep_last: how many of the newest stay, each with the one that it calls the best.
        rank: this process's.
        say: gets the sentences that a person should read (a damaged checkpoint was passed over), on every rank.
        keep_every_steps: checkpoints of steps that it divides stay as well.
        asynchronous: :meth:`save` returns when it has looked at the state, and the rest happens beside the training.
            The state's tensors must then not change before :meth:`before_update`.
        layout: degrees of the mesh; random generators come back where it is the same.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int,
        rank: int = 0,
        say: Callable[[str], None] = print,
        *,
        keep_every_steps: int | None = None,
        asynchronous: bool = False,
        layout: Mapping[str, int] | None = None,
    ) -> None:
        self.keep_last, self.keep_every_steps, self.rank, self.say = keep_last, keep_every_steps, rank, say
        self._asynchronous, self._layout = asynchronous, None if layout is None else dict(layout)
        self._folder, self._ranks = checkpoint_folder(folder), Ranks(rank)
        self._memory = WritePlan(), HostBuffer()
        self._saving: Saving | None = None
        self._stall_seconds = 0.0

    def save(self, state: TrainState, *, wait: bool = False) -> str | Path:
        """Write the checkpoint of ``state.progress.step`` and drop those that retention no longer wants.

        Args:
            wait: until it is there, also where saves are asynchronous.

        Raises:
            CheckpointError: the disk or the store said no, on any rank, at this save or at the one before it, which
                was still under way; earlier checkpoints are untouched, the torn one is removed.
        """
        self.wait()
        begun = time.perf_counter()
        snapshot = self._snapshot(state)
        retain = partial(self._retain, snapshot.name)
        self._saving = Saving(snapshot, self._folder, self._ranks, self._memory, retain, FORMAT_VERSION)
        self._stall_seconds += time.perf_counter() - begun
        if wait or not self._asynchronous:
            self.wait()
        return self.path(state.progress.step)

    def before_update(self) -> None:
        """Wait until the weights may change. What failed is raised by the next :meth:`save` or :meth:`wait`, where all
        ranks stand at the same place."""
        if self._saving is not None:
            begun = time.perf_counter()
            self._saving.wait_for_copy()
            self._stall_seconds += time.perf_counter() - begun

    def wait(self) -> None:
        """Wait for the save that is under way.

        Raises:
            CheckpointError: it failed, on any rank.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            begun = time.perf_counter()
            saving.wait()
            self._stall_seconds += time.perf_counter() - begun

    def close(self) -> None:
        """Let the save that is under way come to its end. For the way out of an error, to which it adds what failed."""
        saving, self._saving, leaving = self._saving, None, sys.exception()
        if saving is not None:
            try:
                saving.wait(_LAST_WAIT_SECONDS)
            except (CheckpointError, TimeoutError) as error:
                if leaving is None:
                    raise
                leaving.add_note(str(error))

    def take_stall_seconds(self) -> float:
        """Seconds for which saving held up this thread since the last call."""
        seconds, self._stall_seconds = self._stall_seconds, 0.0
        return seconds

    def path(self, step: int) -> str | Path:
        """Where the checkpoint of ``step`` stands, if it does; a URL in a store."""
        return self._folder.path(step_folder(step))

    def resume(self, state: TrainState) -> str | Path | None:
        """Fill ``state`` from the newest checkpoint that is whole; None, and ``state`` as it was, if there is none.

        Everything that is read is checked as it is read, and a damaged checkpoint is passed over for the one before
        it, which then fills the state again. The last that is left is checked before it is read.

        Raises:
            CheckpointError: as :meth:`newest` and :meth:`load`; or all of several are damaged, and reading them has
                left their values in ``state``.
        """
        names, problems, touched = self._candidates(), [], False
        for number, name in enumerate(names):
            problem = self._deep_damage(name) if number == len(names) - 1 else None
            if problem is None:
                problem = self._load(name, state)
                touched = True
            if problem is None:
                return self._folder.path(name)
            self.say(f"skipped checkpoint {name}: {problem}")
            problems.append(f"{name}: {problem}")
        if touched:
            raise CheckpointError(
                "every checkpoint is damaged, and the model holds what was read of them",
                where=self._folder.path(names[0]),
                got="; ".join(problems),
                fix="bring one of them back, or remove them all to start anew",
            )
        return None

    def newest(self) -> str | Path | None:
        """The newest checkpoint that is whole; each damaged one on the way is named through ``say``. The ranks read and
        check all of it, each its part.

        Raises:
            CheckpointError: the newest whole one is of another format than this code reads.
        """
        for name in self._candidates():
            problem = self._deep_damage(name)
            if problem is None:
                return self._folder.path(name)
            self.say(f"skipped checkpoint {name}: {problem}")
        return None

    def load(self, path: str | Path, state: TrainState) -> None:
        """Fill ``state`` from a checkpoint of this folder, whatever number of ranks wrote it, in whatever layout.

        Random generators come back only where the layout that wrote it reads it; the data position always does.

        Raises:
            CheckpointError: it is damaged, of another run (other train section or data), or of another model or
                optimiser.
        """
        self.wait()
        problem = self._load(str(path).rpartition("/")[2], state)
        if problem is not None:
            raise CheckpointError("the checkpoint is damaged", where=path, got=problem, fix="use another checkpoint")

    def _snapshot(self, state: TrainState) -> Snapshot:
        tensors = state.tensors()
        texts = {_generators_file(self.rank): json.dumps(rng_state())}
        if self.rank == 0:
            content: dict[str, Any] = {
                "progress": dataclasses.asdict(state.progress),
                "trajectory": state.trajectory,
                "loader": state.loader.state(),
                "optimizer": state.optimizer_numbers(),
                "report": state.report,
                "world": self._ranks.world,
                "layout": self._layout,
            }
            texts[STATE] = json.dumps(content)
        ready = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            ready = torch.cuda.Event()
            ready.record()
        return Snapshot(step_folder(state.progress.step), tensors, texts, ready)

    def _candidates(self) -> list[str]:
        """Checkpoints that look whole, the newest first; rank 0 looks for all."""
        self.wait()
        found: tuple[list[str], list[str], CheckpointError | None] = ([], [], None)
        if self.rank == 0:
            found = self._search()
        names, notes, error = self._ranks.gather(found)[0]
        for note in notes:
            self.say(note)
        if error is not None:
            raise error
        return list(names)

    def _search(self) -> tuple[list[str], list[str], CheckpointError | None]:
        names: list[str] = []
        notes: list[str] = []
        self._folder.remove_torn()
        for name in reversed(self._folder.names()):
            try:
                problem = damage(self._folder.path(name))
            except CheckpointError as error:
                return names, notes, None if names else error
            if problem is None:
                names.append(name)
            else:
                notes.append(f"skipped checkpoint {name}: {problem}")
        return names, notes, None

    def _deep_damage(self, name: str) -> str | None:
        """What is wrong with the tensors of a checkpoint, or None; each rank reads its part."""

        def check() -> None:
            files, catalogue = _open(self._folder.path(name))
            check_chunks(files, catalogue, self.rank, self._ranks.world)

        return self._judged(name, check)

    def _load(self, name: str, state: TrainState) -> str | None:
        """What is wrong with the checkpoint, or None: then the state is filled."""
        path = self._folder.path(name)
        raw: dict[str, Any] = {}

        def load() -> None:
            files, catalogue = _open(path)
            raw.update(json.loads(files.text(STATE)))
            _check_trajectory(raw["trajectory"], state.trajectory, path)
            state.make_optimizer_state(catalogue, raw["optimizer"])
            tensors = state.tensors()
            check_fits(catalogue, tensors, path)
            read_tensors(files, catalogue, tensors)
            if (raw["world"], raw["layout"]) == (self._ranks.world, self._layout):
                set_rng_state(json.loads(files.text(_generators_file(self.rank))))

        problem = self._judged(name, load)
        if problem is None:
            state.loader.load_state(raw["loader"])
            state.progress = type(state.progress)(**raw["progress"])
            state.report = raw["report"]
        return problem

    def _judged(self, name: str, work: Callable[[], None]) -> str | None:
        """What damage any rank found at work, or None; a collective.

        Raises:
            CheckpointError: on all ranks, where one found that the checkpoint is another's or cannot be reached.
        """
        problem: str | None = None
        refusal: PosttrainError | None = None
        try:
            work()
        except DamagedError as error:
            problem = str(error)
        except PosttrainError as error:
            refusal = error
        except OSError as error:
            try:
                problem = _lost_bytes(error, self._folder.path(name))
            except CheckpointError as unreachable:
                refusal = unreachable
        answers = self._ranks.gather((problem, refusal))
        refused = refusal or next((error for _, error in answers if error is not None), None)
        if refused is not None:
            raise refused
        return next((found for found, _ in answers if found), None)

    def _retain(self, saved: str) -> None:
        """Keep the newest ``keep_last``, whichever checkpoint each of those calls the best, and one every so many.

        The newest is the one just ``saved``. Those of later steps were damaged when the run went back behind them:
        they stay, and count for nothing, until the run comes to their step again.
        """
        names = [name for name in self._folder.names() if name <= saved]
        kept = set(names[-self.keep_last :])
        for name in list(kept):
            best = _best_step(self._folder.path(name))
            if best is not None:
                kept.add(step_folder(best))
        for name in names:
            every = self.keep_every_steps
            if name not in kept and (every is None or int(name.removeprefix("step-")) % every):
                self._folder.remove(name)


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint's manifest, small files and sizes, or None. Does not read the tensors: reading
    them checks them.

    Raises:
        CheckpointError: it is of another format than this code reads, or cannot be reached.
    """
    files = checkpoint_files(path)
    try:
        content = json.loads(files.text(MANIFEST))
        version, listed, world = content["format_version"], content["files"], content["world"]
        written = {STATE, *(file(rank) for rank in range(world) for file in (image_file, index_file, _generators_file))}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({_lost_bytes(error, path)})"
    except (ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint is of {'a newer' if version > FORMAT_VERSION else 'an older'} format",
            where=path,
            got=version,
            expected=FORMAT_VERSION,
            fix="go on with the version of this project that wrote it, or export its model there and start from that "
            "(model.path), with an empty work folder",
        )
    if set(listed) != written:
        return f"{MANIFEST} lists other files than {world} rank(s) write"
    for name, (size, digest) in listed.items():
        try:
            found = files.size(name)
            if found != size:
                return f"{name} has {found} of {size} bytes"
            if digest is not None and digest_text(files.text(name)) != digest:
                return f"{name} has another sha256"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({_lost_bytes(error, path)})"
        except UnicodeDecodeError:
            return f"{name} has another sha256"
    return None


def load_model_state(path: str | Path) -> dict[str, Tensor]:
    """Whole weights of a checkpoint on the CPU, in the dtypes of training, by our parameter names; in one process,
    whatever wrote it.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    problem = damage(path)
    if problem is None:
        try:
            files, catalogue = _open(path)
            stored = {name: tensor for name, tensor in sorted(catalogue.items()) if name.startswith(_MODEL)}
            wanted = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in stored.items()}
            read_tensors(files, stored, wanted)
            return {name.removeprefix(_MODEL): value for name, value in wanted.items()}
        except DamagedError as error:
            problem = str(error)
    raise CheckpointError("the checkpoint is damaged", where=path, got=problem, fix="use another checkpoint")


def fetch_checkpoint(url: str, out: Path) -> Path:
    """Copy a checkpoint of a store to a disk, into the folder ``out``, a few megabytes at a time; where it then stands.

    Raises:
        CheckpointError: it is damaged.
    """
    files, name, folder = checkpoint_files(url), url.rstrip("/").rpartition("/")[2], LocalFolder(out)
    problem = damage(url)
    if problem is not None:
        raise CheckpointError("the checkpoint is damaged", where=url, got=problem, fix="use another checkpoint")
    manifest = files.text(MANIFEST)
    folder.prepare(name)
    for file, (size, digest) in json.loads(manifest)["files"].items():
        if digest is not None:
            folder.put(name, file, files.text(file))
            continue
        image, buffer = folder.image(name, file, size), HostBuffer()
        block = as_bytes(buffer.reserve(WRITE_BYTES, pinned=False))
        for begin in range(0, size, WRITE_BYTES):
            files.read_into(file, begin, [block[: min(WRITE_BYTES, size - begin)]])
            image.write(begin, block)
        image.close()
    folder.publish(name, manifest)
    return folder.path(name)


def _lost_bytes(error: OSError, where: object) -> str:
    """What the disk says where it cannot read what it has.

    Raises:
        CheckpointError: it is anything else, and the checkpoint may be whole: no rights, a storage that is away.
    """
    if error.errno == errno.EIO:
        return reason(error)
    raise CheckpointError("the checkpoint cannot be read", where=where, got=reason(error)) from error


def _generators_file(rank: int) -> str:
    return f"rng-{rank}.json"


def _open(path: str | Path) -> tuple[CheckpointFiles, dict[str, StoredTensor]]:
    files = checkpoint_files(path)
    world = json.loads(files.text(MANIFEST))["world"]
    return files, read_catalogue(files.text(index_file(rank)) for rank in range(world))


def _check_trajectory(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: object) -> None:
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"the checkpoint is of another run: {name} differs",
                where=where,
                got=saved.get(name),
                expected=value,
                fix="restore that value, or start anew with an empty work folder",
            )


def _best_step(path: str | Path) -> int | None:
    """Which step a checkpoint calls the best; None too where it is damaged, which then keeps nothing alive.

    Raises:
        CheckpointError: it cannot be reached.
    """
    try:
        step = json.loads(checkpoint_files(path).text(STATE))["progress"]["best_step"]
    except FileNotFoundError:
        return None
    except OSError as error:
        _lost_bytes(error, path)
        return None
    except (ValueError, KeyError):
        return None
    return None if step is None else int(step)
