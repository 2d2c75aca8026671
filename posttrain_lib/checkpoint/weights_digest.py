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
from posttrain_lib.ops.splitmix import STEP, mixed_
from posttrain_lib.parallel.process_group import gather_objects

#: entries that are widened to eight bytes at a time
_CHUNK = 1 << 18
#: rows are numbered from here on, columns from 0
_ROWS = 1 << 40
#: by bytes of an entry. Eight are read as two columns: products of a word's highest bits would cancel
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int32}


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
    bits = block.contiguous().view(_BITS[block.element_size()])
    first = begin[-1] * (bits.shape[-1] // block.shape[-1])
    columns = _odd(torch.arange(first, first + bits.shape[-1], device=device))
    parts = bits.reshape(-1, bits.shape[-1]).split(max(1, _CHUNK // bits.shape[-1]))
    of_rows = torch.cat([(part.long() * columns).sum(1) for part in parts])
    return int((of_rows * _odd(row.reshape(-1) + _ROWS)).sum()) % 2**64


def _odd(numbers_N: Tensor) -> Tensor:
    """Odd int64 numbers without any pattern, for factors: modulo 2^64 an odd one loses no bit of what it multiplies."""
    return mixed_((numbers_N + 1) * STEP) | 1
