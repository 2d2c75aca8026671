"""Joining and leaving the group of ranks, and small sums over it."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: how long a rank waits for the others in one collective before it gives up
_TIMEOUT = datetime.timedelta(minutes=30)


@contextlib.contextmanager
def process_group(rank: int, world: int, rendezvous: str | None, device: torch.device) -> Iterator[None]:
    """Be ``rank`` of ``world`` while inside; nothing at all for a world of one.

    ``rendezvous`` is ``host:port`` of rank 0. gloo on CPU, NCCL on CUDA.
    """
    if world == 1:
        yield
        return
    if rendezvous is None:
        raise ValueError(f"rank {rank} of {world} needs a rendezvous address")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"tcp://{rendezvous}", rank=rank, world_size=world, timeout=_TIMEOUT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def global_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place; the values themselves without a group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
