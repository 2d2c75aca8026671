"""A save in the background: the ranks' threads copy, write, agree and publish while training goes on.

    main thread   save() . . . forward, backward . before_update() . optimizer.step() . . . . . . next save(), wait()
    this thread       who writes what . copy ......|. write and hash ... agree . manifest . retention |

The main thread waits for the copy alone, and only if the next forward and backward were shorter. The ranks' threads
talk in a group of their own: collectives of two threads in one group would meet each other's.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from posttrain_lib.checkpoint.state_files import CheckpointFolder
from posttrain_lib.checkpoint.state_layout import Part, box_key, owned, parts_of
from posttrain_lib.checkpoint.state_writer import HostBuffer, RankImage, image_file, index_file
from posttrain_lib.errors import CheckpointError, PosttrainError
from posttrain_lib.lineage.digests import digest_text
from posttrain_lib.parallel.process_group import world_size

#: how long a rank waits for the others' part of a save: they may write for long
_TIMEOUT = datetime.timedelta(hours=2)


class Ranks:
    """The ranks that save together, and their own group to talk in. Made on all ranks alike."""

    def __init__(self, rank: int) -> None:
        self.rank, self.world = rank, world_size()
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if self.world > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def together(self, work: Callable[[], Any], *, everywhere: bool = True) -> list[Any]:
        """What ``work`` returned on each rank, or on rank 0 alone; if it failed on any, an error on all.

        Raises:
            CheckpointError: with every rank's reason.
        """
        result = failure = None
        try:
            if everywhere or self.rank == 0:
                result = work()
        except Exception as error:  # of a disk, a store's client or torch: the peers wait and must hear of any
            failure = f"rank {self.rank}: {reason(error)}"
        answers = self.gather((result, failure))
        failures = [failed for _, failed in answers if failed]
        if failures:
            raise CheckpointError("; ".join(failures))
        return [answer for answer, _ in answers]


def reason(error: BaseException) -> str:
    """One line for a report."""
    if isinstance(error, PosttrainError):
        return "; ".join(text for text in (error.what, error.where, error.got) if text)
    return f"{type(error).__name__}: {str(error).strip() or repr(error)}"


class WritePlan:
    """Who writes what, remembered as long as no rank's boxes change."""

    def __init__(self) -> None:
        self._known: list[bytes] = []
        self._holders: dict[int, list[int]] = {}

    def owned(self, parts: list[Part], ranks: Ranks) -> list[Part]:
        """This rank's share of its parts. A collective of a few bytes, the first time of eight for each box."""
        if ranks.world == 1:
            return parts
        keys = np.asarray([box_key(part) for part in parts], dtype=np.int64)
        known = ranks.gather(hashlib.blake2b(keys.tobytes(), digest_size=16).digest())
        if known != self._known:
            holders: dict[int, list[int]] = {int(key): [] for key in keys}
            for rank, others in enumerate(ranks.gather(keys)):
                for key in others.tolist():
                    if key in holders:
                        holders[key].append(rank)
            self._known, self._holders = known, holders
        return owned(parts, self._holders, ranks.rank)


@dataclass(frozen=True)
class Snapshot:
    """What a save takes from the training: tensors by name, which it copies before they change, and finished texts.

    ``texts``: file -> content, of this rank. ``ready``: where a CUDA device has the tensors' values.
    """

    name: str
    tensors: Mapping[str, Tensor]
    texts: Mapping[str, str]
    ready: torch.cuda.Event | None


class Saving:
    """One save, from its start to its end."""

    def __init__(
        self,
        snapshot: Snapshot,
        folder: CheckpointFolder,
        ranks: Ranks,
        memory: tuple[WritePlan, HostBuffer],
        retain: Callable[[], None],
        version: int,
    ) -> None:
        self._snapshot, self._folder, self._ranks = snapshot, folder, ranks
        (self._plan, self._buffer), self._retain, self._version = memory, retain, version
        self._copied = threading.Event()
        self._failure: BaseException | None = None
        self._device = torch.cuda.current_device() if snapshot.ready is not None else None
        self._thread = threading.Thread(target=self._run, name=f"save {snapshot.name}", daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Until no tensor of the training is needed any more, or the save has failed."""
        self._copied.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Until it is over.

        Raises:
            CheckpointError: it failed, on any rank.
            TimeoutError: it is not over after so many seconds.
        """
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"checkpoint {self._snapshot.name} is still being written")
        if self._failure is not None:
            raise CheckpointError(
                "the checkpoint could not be written; those before it are untouched",
                where=self._folder.path(self._snapshot.name),
                got=self._failure.what if isinstance(self._failure, CheckpointError) else reason(self._failure),
                fix="free space or name another place (train.checkpoint.folder, or POSTTRAIN_STORE for all); the run "
                "then goes on from the last checkpoint",
            ) from self._failure

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # of each thread its own
            self._save()
        except BaseException as error:  # kept for whoever waits
            self._failure = error
        finally:
            self._copied.set()

    def _save(self) -> None:
        name, folder, ranks = self._snapshot.name, self._folder, self._ranks
        try:
            image = self._take()
            self._copied.set()
            ranks.together(lambda: folder.prepare(name), everywhere=False)
            written = ranks.together(lambda: self._write(image))
            files = {file: facts for part in written for file, facts in sorted(part.items())}
            manifest = json.dumps({"format_version": self._version, "world": ranks.world, "files": files}, indent=1)
            ranks.together(lambda: folder.publish(name, manifest), everywhere=False)
        except CheckpointError as error:
            try:
                if ranks.rank == 0:
                    folder.remove_torn()
            except Exception as another:  # a disk or store that failed once; the next start removes it
                raise CheckpointError(f"{error.what}; what is left of it stays: {reason(another)}") from error
            raise
        ranks.together(self._retain, everywhere=False)

    def _take(self) -> RankImage:
        tensors = self._snapshot.tensors
        parts = [part for name, tensor in tensors.items() for part in parts_of(name, tensor)]
        mine = self._plan.owned(parts, self._ranks)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

        def copy() -> None:
            image = RankImage(mine, shapes, self._buffer)
            with torch.no_grad():
                image.copy(self._snapshot.ready)
            images.append(image)

        images: list[RankImage] = []
        self._ranks.together(copy)
        return images[0]

    def _write(self, image: RankImage) -> dict[str, tuple[int, str | None]]:
        """This rank's files: name -> (bytes, sha256; None of the image, whose checksums are in its index)."""
        rank, files = self._ranks.rank, {}
        for file, text in self._snapshot.texts.items():
            self._folder.put(self._snapshot.name, file, text)
            files[file] = (len(text.encode("utf-8")), digest_text(text))
        size, index = image.write(self._folder, self._snapshot.name, rank)
        files[index_file(rank)] = (len(index.encode("utf-8")), digest_text(index))
        return {**files, image_file(rank): (size, None)}
