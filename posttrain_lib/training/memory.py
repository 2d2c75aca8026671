"""What a rank's memory holds, by kind, from the tensors themselves, and the peak that the allocator saw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_GIB = 2**30


class MemoryMeter:
    """Weights, gradients and optimiser state of this rank, in GiB, and what a step's forward kept.

    ``weights`` and ``gradients`` are those that stood when the optimiser first stepped: sharded ones lie whole around a
    forward. ``activations``: on CUDA the allocator's highest
    level over the first step, less what stood before its first forward, so that gradients and buffers in use at that
    moment are in it; on a CPU, whose allocator keeps no books, what autograd saved for the backward in the largest
    forward of the first step, each storage once, weights left out. Absent where neither was seen (on a CPU, compiled
    and recomputed blocks keep their tensors to themselves).
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self._weights: float | None = None
        self._gradients: float | None = None
        self._activations: float | None = None

    def _see_gradients(self, *_: Any) -> None:
        self._weights = bytes_of(self.model.parameters()) / _GIB
        self._gradients = bytes_of(parameter.grad for parameter in self.model.parameters()) / _GIB

    @contextlib.contextmanager
    def first_step(self, *, saved_tensors: bool) -> Iterator[None]:
        """Around the first optimiser step of this process; nothing around the later ones. ``saved_tensors``: on a CPU,
        look at what autograd saves."""
        if self._gradients is not None:  # they are the same at every step
            yield
            return
        # Only in here: a resumed run's state is made by steps of the optimiser with one gradient each.
        handle = self.optimizer.register_step_pre_hook(self._see_gradients)
        try:
            with self._forward(saved_tensors):
                yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _forward(self, saved_tensors: bool) -> Iterator[None]:
        """See what the first step keeps for its backward, whether or not the optimiser then steps."""
        if self._activations is not None:
            yield
        elif self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield
            self._activations = (torch.cuda.max_memory_allocated(self.device) - before) / _GIB
        elif saved_tensors:
            books = _Saved({parameter.untyped_storage().data_ptr() for parameter in _local(self.model.parameters())})
            with torch.autograd.graph.saved_tensors_hooks(books.pack, books.unpack):
                yield
            self._activations = books.most / _GIB
        else:
            yield

    def by_kind(self) -> dict[str, float]:
        """GiB of this rank by kind; only kinds that were seen."""
        state = (value for values in self.optimizer.state.values() for value in _tensors(values))
        found = {
            "weights": self._weights,
            "gradients": self._gradients,
            "optimizer": bytes_of(state) / _GIB,
            "activations": self._activations,
        }
        return {kind: size for kind, size in found.items() if size is not None}


class _Saved:
    """Bytes of storages that a graph holds on to, while it does."""

    def __init__(self, known: set[int]) -> None:
        self.known, self.held, self.now, self.most = known, {}, 0, 0  # type: ignore[var-annotated]

    def pack(self, tensor: Tensor) -> _Held:
        local = next(iter(_local([tensor])))
        storage = local.untyped_storage()
        return _Held(self, tensor, storage.data_ptr(), storage.nbytes())

    def unpack(self, held: _Held) -> Tensor:
        return held.tensor


class _Held:
    """One saved tensor; its storage is counted from its first to its last holder."""

    def __init__(self, books: _Saved, tensor: Tensor, place: int, size: int) -> None:
        self.books, self.tensor, self.place, self.size = books, tensor, place, size
        if place in books.known:
            return
        holders = books.held.get(place, 0)
        books.held[place] = holders + 1
        if not holders:
            books.now += size
            books.most = max(books.most, books.now)

    def __del__(self) -> None:
        if self.place in self.books.known:
            return
        self.books.held[self.place] -= 1
        if not self.books.held[self.place]:
            del self.books.held[self.place]
            self.books.now -= self.size


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes that this rank holds for the tensors: of their storages, each once."""
    storages = (local.untyped_storage() for local in _local(tensor for tensor in tensors if tensor is not None))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _local(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    from torch.distributed.tensor import DTensor

    for tensor in tensors:
        yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
