"""Weights in chunks of bounded size, for processes that share no memory.

    weights --in_chunks--> [Part, ...], [Part, ...] --any transport--> from_chunks --> weights

A chunk holds small tensors whole and as much of a large one as there is room for: neither side holds more than a chunk
and the tensor that it is at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some bytes of a named tensor, row-major: ``data`` uint8 [n], from byte ``begin`` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    data: np.ndarray

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


Chunk = list[Part]


def in_chunks(weights: Iterable[tuple[str, Tensor]], most: int, *, sends: bool = True) -> Iterator[Chunk]:
    """The tensors, in order, in chunks of at most ``most`` bytes; copies.

    ``sends`` is off on a rank that takes part because every rank must iterate: its chunks come at the same moments and
    are empty.
    """
    chunk: Chunk = []
    room = most
    for name, tensor in weights:
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        begin = 0
        while begin < len(flat) or begin == 0:
            end = min(len(flat), begin + room)
            if sends:
                # Never numpy() of the weight itself: its storage could not be freed and filled again as FSDP does.
                data = flat[begin:end].to("cpu", copy=True).numpy()
                chunk.append(Part(name, tensor.dtype, tuple(tensor.shape), begin, data))
            room -= end - begin
            if not room:
                yield chunk
                chunk, room = [], most
            if end == len(flat):
                break
            begin = end
    if room < most or chunk:
        yield chunk


def from_chunks(chunks: Iterable[Chunk]) -> Iterator[tuple[str, Tensor]]:
    """The tensors again, on the CPU.

    Raises:
        ValueError: a part is missing, or not where it was sent.
    """
    whole, filled = torch.empty(0, dtype=torch.uint8), 0
    for part in (part for chunk in chunks for part in chunk):
        if part.begin == 0:
            _check_whole(filled == len(whole), part)
            whole, filled = torch.empty(part.size, dtype=torch.uint8), 0
        _check_whole(part.begin == filled and filled + len(part.data) <= len(whole) == part.size, part)
        whole.numpy()[filled : filled + len(part.data)] = part.data
        filled += len(part.data)
        if filled == len(whole):
            yield part.name, whole.view(part.dtype).reshape(part.shape)
    if filled != len(whole):
        raise ValueError(f"the chunks end within a tensor, {filled} of {len(whole)} bytes")


def _check_whole(holds: bool, part: Part) -> None:
    if not holds:
        raise ValueError(f"a part of {part.name} at byte {part.begin} does not follow on what came before")
