"""Reading a checkpoint into whatever layout there is: each rank the chunks that overlap its shards, checked as they
come.

A chunk that lies whole in contiguous memory of the host is read straight into it; any other goes through a buffer of
its own size. So a rank needs its share and a few chunks, however the checkpoint was cut.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain_lib.checkpoint.state_files import CheckpointFiles
from posttrain_lib.checkpoint.state_layout import ALIGNMENT, Box, Part, as_bytes, chunks_of, parts_of
from posttrain_lib.errors import CheckpointError

_THREADS = 4
#: bytes of neighbouring chunks that are asked for together: a store takes a while to answer
_TOGETHER_BYTES = 8 << 20


class DamagedError(Exception):
    """A file is not what was written; the text names file, tensor and bytes."""


@dataclass(frozen=True)
class Stored:
    """A chunk: its box of a tensor, the file and byte where it stands, and its checksum."""

    box: Box
    file: str
    byte: int
    crc32: int


@dataclass
class StoredTensor:
    """What a checkpoint has of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Stored] = field(default_factory=list)

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


def read_catalogue(texts: Iterable[str]) -> dict[str, StoredTensor]:
    """Name -> tensor, of the ranks' indices.

    Raises:
        DamagedError: the boxes of a tensor do not make it whole.
    """
    catalogue: dict[str, StoredTensor] = {}
    for text in texts:
        index = json.loads(text)
        for entry in index["tensors"]:
            shape, dtype = tuple(entry["shape"]), getattr(torch, entry["dtype"])
            tensor = catalogue.setdefault(entry["name"], StoredTensor(dtype, shape))
            byte, box = entry["byte"], Box(*(tuple(numbers) for numbers in entry["box"]))
            for chunk, crc in zip(chunks_of(box, tensor.item_bytes), entry["crc32"], strict=True):
                tensor.chunks.append(Stored(chunk, index["file"], byte, crc))
                byte += chunk.numel * tensor.item_bytes
    for name, tensor in catalogue.items():
        # boxes never overlap: each is written by one rank
        if sum(chunk.box.numel for chunk in tensor.chunks) != Box((), tensor.shape).numel:
            raise DamagedError(f"{name} is not whole")
    return catalogue


def check_fits(catalogue: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], where: object) -> None:
    """Refuse a checkpoint that does not have these tensors, in these shapes and dtypes, or has others.

    Raises:
        CheckpointError: naming the first that differ.
    """
    have = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in catalogue.items()}
    need = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in wanted.items()}
    if have == need:
        return
    differing = [name for name in sorted(have | need) if have.get(name) != need.get(name)][:4]
    raise CheckpointError(
        "the checkpoint does not fit this model and optimiser",
        where=where,
        got={name: have.get(name) for name in differing},
        expected={name: need.get(name) for name in differing},
        fix="start from the model and optimiser that it was made with, or anew with an empty work folder",
    )


def read_tensors(files: CheckpointFiles, catalogue: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> None:
    """Fill this rank's shards in place; :func:`check_fits` has passed.

    Raises:
        DamagedError: a chunk that was read is not what was written.
    """
    tasks = []
    for name, tensor in wanted.items():
        stored, parts = catalogue[name], parts_of(name, tensor)
        for chunk in stored.chunks:
            targets = [(part, box) for part in parts if (box := part.box.overlap(chunk.box)) is not None]
            if targets:
                tasks.append(_Task(name, stored, chunk, tuple(targets)))
    with torch.no_grad():
        _run(files, tasks)


def check_chunks(files: CheckpointFiles, catalogue: Mapping[str, StoredTensor], rank: int, world: int) -> None:
    """Read and check every ``world``-th chunk, from ``rank`` on; all ranks together check them all.

    Raises:
        DamagedError: naming the first that is not what was written.
    """
    tasks = [_Task(name, stored, chunk, ()) for name, stored in sorted(catalogue.items()) for chunk in stored.chunks]
    _run(files, tasks[rank::world])


@dataclass(frozen=True)
class _Task:
    """A chunk to be read, and where it goes."""

    name: str
    stored: StoredTensor
    chunk: Stored
    targets: tuple[tuple[Part, Box], ...]

    @property
    def end(self) -> int:
        """Byte behind the chunk."""
        return self.chunk.byte + self.chunk.box.numel * self.stored.item_bytes

    def memory(self) -> tuple[memoryview, Tensor | None]:
        """Bytes to read into, and the buffer that they are, where it is not the target itself."""
        box = self.chunk.box
        if len(self.targets) == 1:
            part, overlap = self.targets[0]
            place = part.values[overlap.within(part.box)]
            if overlap == box and place.device.type == "cpu" and place.is_contiguous():
                return as_bytes(place), None
        buffer = torch.empty(box.shape, dtype=self.stored.dtype)
        return as_bytes(buffer), buffer

    def finish(self, memory: memoryview, buffer: Tensor | None) -> None:
        if zlib.crc32(memory) != self.chunk.crc32:
            raise DamagedError(
                f"{self.chunk.file} is damaged: bytes {self.chunk.byte} to {self.end} ({self.name}) have another crc32"
            )
        if buffer is None:
            return
        for part, overlap in self.targets:
            part.values[overlap.within(part.box)].copy_(buffer[overlap.within(self.chunk.box)])


def _run(files: CheckpointFiles, tasks: list[_Task]) -> None:
    tasks.sort(key=lambda task: (task.chunk.file, task.chunk.byte))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint-read") as pool:
        running = [pool.submit(_read, files, group) for group in _groups(tasks)]
        try:
            for done in running:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _groups(tasks: list[_Task]) -> Iterator[list[_Task]]:
    """Neighbours in a file, up to :data:`_TOGETHER_BYTES`; what lies between them is alignment."""
    group: list[_Task] = []
    for task in tasks:
        if group:
            last, first = group[-1], group[0]
            apart = task.chunk.file != last.chunk.file or not 0 <= task.chunk.byte - last.end < ALIGNMENT
            if apart or task.end - first.chunk.byte > _TOGETHER_BYTES:
                yield group
                group = []
        group.append(task)
    if group:
        yield group


def _read(files: CheckpointFiles, group: list[_Task]) -> None:
    with torch.no_grad():  # of each thread its own
        places = [task.memory() for task in group]
        buffers: list[memoryview] = []
        at = group[0].chunk.byte
        for task, (memory, _) in zip(group, places, strict=True):
            buffers += [memoryview(bytearray(task.chunk.byte - at))] if task.chunk.byte > at else []
            buffers.append(memory)
            at = task.end
        file = group[0].chunk.file
        try:
            files.read_into(file, group[0].chunk.byte, buffers)
        except FileNotFoundError as error:
            raise DamagedError(f"{file} is missing") from error
        except EOFError as error:
            raise DamagedError(str(error)) from error
        for task, (memory, buffer) in zip(group, places, strict=True):
            task.finish(memory, buffer)
