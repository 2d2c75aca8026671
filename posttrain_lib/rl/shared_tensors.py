"""Tensors from one process to another on the same machine, through memory that both have open: one copy, into it.

    tensors --buckets--> Bucket, Bucket --a pipe--> SharedTensors --> views, until the next bucket

On the host a bucket holds everything: 500 MB took 0.1 s on one core, and 1.5 s as pickled bytes. On a CUDA device it is
as much as fits a buffer of bounded size, which the other process opens once, by its CUDA IPC handle.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

#: tensors begin at multiples of this; any dtype's alignment
_ALIGNMENT = 64
#: bytes of a buffer on a device, unless a tensor is larger
_BUFFER = 1 << 29
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
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Tensors that are in the memory at once; ``handle``: how to open a device's buffer, where it is a new one."""

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
    """The sender's end of a buffer on a CUDA device, which may be another than the tensors'."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._make(_BUFFER)

    def buckets(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
        """As many as it takes; what one holds must be read before the next is asked for."""
        placed: list[Placed] = []
        offset = 0
        for name, tensor in weights:
            data = _bytes_of(tensor)
            if offset + len(data) > len(self._buffer):
                if placed:
                    yield self._bucket(placed)
                    placed, offset = [], 0
                if len(data) > len(self._buffer):
                    self._make(len(data))
            self._buffer[offset : offset + len(data)].copy_(data)
            placed.append(Placed(name, tensor.dtype, tuple(tensor.shape), offset))
            offset = _aligned(offset + len(data))
        yield self._bucket(placed)

    def _make(self, size: int) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._is_new = True

    def _bucket(self, placed: list[Placed]) -> Bucket:
        torch.cuda.synchronize(self._device)  # the other process knows nothing of this one's streams
        handle = reduce_tensor(self._buffer)[1] if self._is_new else None
        self._is_new = False
        return Bucket(tuple(placed), handle)


class SharedTensors:
    """The receiver's end of either memory."""

    def __init__(self, descriptor: int) -> None:
        """``descriptor``: the host memory's, for buckets without a device."""
        self._descriptor = descriptor
        self._buffer: Tensor | None = None

    def of(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """Views of what the bucket holds; at the end of the iteration all work that was asked of them is done."""
        if bucket.handle is not None:
            self._buffer = _opened(bucket.handle)
        if self._buffer is not None:
            for each in bucket.placed:
                part = self._buffer[each.offset : each.offset + each.size]
                yield each.name, part.view(each.dtype).view(each.shape)
            torch.cuda.synchronize(self._buffer.device)
        elif bucket.placed:
            view = mmap.mmap(self._descriptor, 0)
            for each in bucket.placed:
                count = torch.Size(each.shape).numel()
                tensor = torch.frombuffer(view, dtype=each.dtype, count=count, offset=each.offset)
                yield each.name, tensor.view(each.shape)


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
