"""Where in the whole tensors a rank's shards lie, who writes what several ranks have, and how boxes are cut in chunks.

A *box* is a block of a tensor in coordinates of the whole tensor: its first corner and its shape. Everything below a
checkpoint goes by boxes, so it knows neither meshes nor placements: a reader takes the overlaps of what is stored with
what it has, whatever layout wrote and whatever layout reads.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from posttrain_lib.errors import CheckpointError

#: bytes that are hashed, read and checked at once: large enough for a disk or a store, small enough beside any tensor
CHUNK_BYTES = 4 << 20
#: every box begins at a multiple of this in its file
ALIGNMENT = 64
#: a box that several ranks have is cut among them above this size; below it, one of them writes it
_SHARED_BYTES = 1 << 16


@dataclass(frozen=True)
class Box:
    """``[begin, begin + shape)`` of a tensor; a scalar's has no dims and one element."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """What both have, None if nothing."""
        begin = tuple(map(max, self.begin, other.begin))
        pairs = zip(self.begin, self.shape, other.begin, other.shape, strict=True)
        end = [min(first + size, start + length) for first, size, start, length in pairs]
        shape = tuple(last - first for first, last in zip(begin, end, strict=True))
        return None if any(size <= 0 for size in shape) else Box(begin, shape)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds ``outer``."""
        starts = [mine - theirs for mine, theirs in zip(self.begin, outer.begin, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))


@dataclass(frozen=True)
class Part:
    """A box of the tensor ``name`` and this rank's memory of it, a view."""

    name: str
    box: Box
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.numel() * self.values.element_size()


def parts_of(name: str, tensor: Tensor) -> list[Part]:
    """What this rank holds of a tensor: nothing, one box, or several where a strided shard is no single one.

    Raises:
        CheckpointError: the local tensor is not what its placements say (a layout that this module does not know).
    """
    if not isinstance(tensor, DTensor):
        box = Box((0,) * tensor.dim(), tuple(tensor.shape))
        return [Part(name, box, tensor.detach())] if box.numel else []
    local = tensor.to_local().detach()
    indices = [_indices(tensor, dim) for dim in range(tensor.dim())]
    if tuple(local.shape) != tuple(len(index) for index in indices):
        raise CheckpointError(
            "a shard is not what its placements say",
            where=name,
            got=f"{tuple(local.shape)} of {tuple(tensor.shape)} under {tensor.placements}",
            expected=str(tuple(len(index) for index in indices)),
            fix="use sizes that the mesh's degrees divide",
        )
    parts = []
    for runs in itertools.product(*[_runs(index) for index in indices]):
        box = Box(tuple(first for _, first, _ in runs), tuple(size for *_, size in runs))
        if box.numel:
            parts.append(Part(name, box, local[tuple(slice(at, at + size) for at, _, size in runs)]))
    return parts


def _indices(tensor: DTensor, dim: int) -> np.ndarray:
    """Which indices of ``dim`` this rank has, by the order in which the placements cut."""
    index = torch.arange(int(tensor.shape[dim]))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return index[:0].numpy()
    for axis, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise CheckpointError("a tensor of partial sums is no state", got=f"placements {tensor.placements}")
        if isinstance(placement, _StridedShard) and placement.dim == dim:
            pieces = [_cut(piece, tensor.device_mesh.size(axis)) for piece in _cut(index, int(placement.split_factor))]
            index = torch.cat([piece[coordinate[axis]] for piece in pieces])
        elif isinstance(placement, Shard) and placement.dim == dim:
            index = _cut(index, tensor.device_mesh.size(axis))[coordinate[axis]]
    return index.numpy()


def _cut(index: Tensor, count: int) -> list[Tensor]:
    """``torch.chunk``, with empty pieces where there are too few."""
    pieces = list(index.chunk(count))
    return pieces + [index[:0]] * (count - len(pieces))


def _runs(index: np.ndarray) -> list[tuple[int, int, int]]:
    """(first place, first index, length) of each stretch of consecutive indices."""
    if not len(index):
        return []
    starts = np.flatnonzero(np.diff(index, prepend=index[0] - 2) != 1)
    ends = np.append(starts[1:], len(index))
    return [(int(at), int(index[at]), int(end - at)) for at, end in zip(starts, ends, strict=True)]


def box_key(part: Part) -> int:
    """64 bits that are equal for the same box of the same tensor on every rank."""
    text = f"{part.name} {part.box.begin} {part.box.shape}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def owned(parts: Sequence[Part], holders: Mapping[int, Sequence[int]], rank: int) -> list[Part]:
    """What this rank is to write: all that it alone has, and its share of what others have as well.

    Large boxes are cut along their first dim among their holders, small ones dealt out by their key: the same on every
    rank without a word between them, and even in bytes.

    Args:
        holders: :func:`box_key` -> ranks that have the box, in order.
    """
    mine: list[Part] = []
    for part in parts:
        key = box_key(part)
        ranks = holders[key]
        if len(ranks) == 1:
            mine.append(part)
        elif part.nbytes < _SHARED_BYTES or part.box.shape[0] < len(ranks):
            mine += [part] if ranks[key % len(ranks)] == rank else []
        else:
            at, rows = ranks.index(rank), part.box.shape[0]
            first, last = rows * at // len(ranks), rows * (at + 1) // len(ranks)
            begin = (part.box.begin[0] + first, *part.box.begin[1:])
            mine.append(Part(part.name, Box(begin, (last - first, *part.box.shape[1:])), part.values[first:last]))
    return mine


def chunks_of(box: Box, item_bytes: int) -> Iterator[Box]:
    """A box as boxes of at most :data:`CHUNK_BYTES`, each contiguous in the box's row-major bytes, in their order."""
    dims = len(box.shape)
    if not dims:
        yield box
        return
    # the first dim whose rows fit: those before it are walked one by one, those behind it stay whole
    cut = next(dim for dim in range(dims) if math.prod(box.shape[dim + 1 :]) * item_bytes <= CHUNK_BYTES)
    rows = max(1, CHUNK_BYTES // max(1, math.prod(box.shape[cut + 1 :]) * item_bytes))
    for outer in itertools.product(*[range(size) for size in box.shape[:cut]]):
        for row in range(0, box.shape[cut], rows):
            at = (*outer, row, *[0] * (dims - cut - 1))
            begin = tuple(first + step for first, step in zip(box.begin, at, strict=True))
            yield Box(begin, (*[1] * cut, min(rows, box.shape[cut] - row), *box.shape[cut + 1 :]))


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, any dtype."""
    array: Any = values.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
