"""A digest of weights that are laid over ranks: of every bit and of its place, the same for every layout.

Each entry's bits are multiplied by numbers of its row and its column, and the products are summed modulo 2^64: sums of
blocks add up to that of the whole, so no rank needs more than its own blocks. It tells weights apart that differ by
accident or by order; it is no signature against somebody who searches for a collision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor

from posttrain_lib.checkpoint.hf import local_block
from posttrain_lib.parallel.process_group import gather_objects

#: entries that are widened to eight bytes at a time
_CHUNK = 1 << 18
#: rows are numbered from here on, columns from 0
_ROWS = 1 << 40
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the sum of every named weight, whole or sharded; every rank calls this and gets the same."""
    own: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, value in named:
        local, begin = local_block(value)
        if local.numel():
            own[name, begin] = block_sum(local.detach(), begin, value.shape)
    # By name and place: what several ranks hold alike counts once.
    blocks = {key: part for ranks in gather_objects(own) for key, part in ranks.items()}
    sums: dict[str, int] = {}
    for (name, _), part in blocks.items():
        sums[name] = (sums.get(name, 0) + part) % 2**64
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def block_sum(block: Tensor, begin: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The sum of a block that begins at ``begin`` in a tensor of ``shape``, in [0, 2^64).

    Args:
        block: [..., n] of a dtype of two, four or eight bytes, at least one dim.
    """
    device = block.device
    row = torch.zeros((), dtype=torch.int64, device=device)
    for size, first, count in zip(shape[:-1], begin, block.shape[:-1], strict=False):
        row = row[..., None] * size + torch.arange(first, first + count, device=device)
    columns = _odd(torch.arange(begin[-1], begin[-1] + block.shape[-1], device=device))
    bits = block.contiguous().view(_BITS[block.element_size()]).reshape(-1, block.shape[-1])
    parts = bits.split(max(1, _CHUNK // block.shape[-1]))
    of_rows = torch.cat([(part.long() * columns).sum(1) for part in parts])
    return int((of_rows * _odd(row.reshape(-1) + _ROWS)).sum()) % 2**64


def _odd(numbers_N: Tensor) -> Tensor:
    """Odd int64 numbers without any pattern, for factors: modulo 2^64 an odd one loses no bit of what it multiplies.

    Source: the SplitMix64 finaliser; Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    value = (numbers_N + 1) * (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        value = (value ^ _shifted(value, shift)) * factor
    return (value ^ _shifted(value, 31)) | 1


def _shifted(value: Tensor, by: int) -> Tensor:
    """To the right as an unsigned number: torch's own shift repeats the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)
