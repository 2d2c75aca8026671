"""Tensors from one process to another on the same machine, through memory that both have open: one copy, into it.

    tensors --buckets--> Bucket, Bucket --a pipe--> SharedTensors --> views, until the next bucket

On the host a bucket holds everything: 500 MB took 0.1 s on one core, and 1.5 s as pickled bytes. On a CUDA device it is
as much as fits a buffer of bounded size, which the other process opens once, by its CUDA IPC handle; there are two.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

#: tensors begin at multiples of this; any dtype's alignment
_ALIGNMENT = 64
_BUFFERS = 2
#: bytes of a buffer on a device; more only where a tensor has more
_BUFFER = 1 << 29
#: buckets of which a buffer keeps the views, the latest ones; together the buffers' are a quarter of a terabyte
_LAYOUTS = 256
#: the place of the device's number among the arguments of ``rebuild_cuda_tensor``
_DEVICE_ARGUMENT = 6


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in the memory: ``offset`` bytes from its beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """The tensor, in uint8 [n]."""
        return memory[self.offset : self.offset + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Tensors that are in the memory at once.

    Attributes:
        handle: how to open a device's buffer; None: they are in the host's memory.
    """

    placed: tuple[Placed, ...] = ()
    handle: tuple[Any, ...] | None = None


class HostMemory:
    """The sender's end of anonymous memory. It stays as large as the most that it held."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("weights")

    def buckets(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
        """One, of all tensors; copied over those of before."""
        placed, offset = [], 0
        for name, tensor in weights:
            data = _bytes_of(tensor).cpu().numpy().data
            placed.append(Placed(name, tensor.dtype, tuple(tensor.shape), offset))
            end = offset + len(data)
            while offset < end:  # one call writes two gigabytes at most
                offset += os.pwrite(self.descriptor, data[len(data) - (end - offset) :], offset)
            offset = _aligned(end)
        yield Bucket(tuple(placed))

    def close(self) -> None:
        """Give it back."""
        os.close(self.descriptor)


class DeviceMemory:
    """The sender's end of two buffers on a CUDA device, which may be another than the tensors': one is filled while the
    other is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_SharedBuffer(device, _BUFFER) for _ in range(_BUFFERS)]

    def buckets(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
        """As many as it takes; when one is asked for, the last but one must have been read. Tensors are kept until
        their bucket is full, and must stay as they are so long."""
        waiting: list[tuple[Placed, Tensor]] = []
        end, number = 0, 0
        for name, tensor in weights:
            if waiting and end + tensor.nbytes > _BUFFER:
                yield self._bucket(number, end, waiting)
                waiting, end, number = [], 0, number + 1
            waiting.append((Placed(name, tensor.dtype, tuple(tensor.shape), end), tensor))
            end = _aligned(end + tensor.nbytes)
        yield self._bucket(number, end, waiting)

    def _bucket(self, number: int, size: int, waiting: list[tuple[Placed, Tensor]]) -> Bucket:
        place = number % _BUFFERS
        if size > len(self._buffers[place].data):
            self._buffers[place] = _SharedBuffer(self._device, size)
        buffer, placed = self._buffers[place], tuple(each for each, _ in waiting)
        if placed:
            torch._foreach_copy_(buffer.views(placed), [tensor.detach() for _, tensor in waiting])
        torch.cuda.synchronize(self._device)  # the other process knows nothing of this one's streams
        return Bucket(placed, buffer.handle)


class _Buffer:
    """Memory on a device, uint8 [n]. Views of it are kept from push to push: making them anew took most of either end's
    time on the host."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.views = lru_cache(_LAYOUTS)(lambda placed: [each.view(data) for each in placed])


class _SharedBuffer(_Buffer):
    """The sender's, and how another process opens it."""

    def __init__(self, device: torch.device, size: int) -> None:
        super().__init__(torch.empty(size, dtype=torch.uint8, device=device))
        self.handle: tuple[Any, ...] = reduce_tensor(self.data)[1]


class SharedTensors:
    """The receiver's end of either memory."""

    def __init__(self, descriptor: int) -> None:
        """``descriptor``: the host memory's."""
        self._descriptor = descriptor
        self._opened: dict[tuple[Any, ...], _Buffer] = {}

    def of(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """Views of what the bucket holds; at the end of the iteration all work that was asked of them is done."""
        if bucket.handle is None:
            if bucket.placed:
                data = torch.frombuffer(mmap.mmap(self._descriptor, 0), dtype=torch.uint8)
                yield from ((each.name, each.view(data)) for each in bucket.placed)
            return
        if bucket.handle not in self._opened:
            # a buffer that grew has another: of those of before, the latest may still be in use
            kept = list(self._opened.items())[-(_BUFFERS - 1) :]
            self._opened = {**dict(kept), bucket.handle: _Buffer(_opened(bucket.handle))}
        buffer = self._opened[bucket.handle]
        yield from zip((each.name for each in bucket.placed), buffer.views(bucket.placed), strict=True)
        torch.cuda.synchronize(buffer.data.device)


def _opened(handle: tuple[Any, ...]) -> Tensor:
    """The sender's buffer. Its device has this process's own number for it: the one that it computes on."""
    arguments = list(handle)
    arguments[_DEVICE_ARGUMENT] = torch.cuda.current_device()
    opened: Tensor = rebuild_cuda_tensor(*arguments)
    return opened


def _bytes_of(tensor: Tensor) -> Tensor:
    """uint8 [n]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
