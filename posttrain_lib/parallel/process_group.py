"""Joining and leaving the group of ranks, and small figures over it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import random
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

#: how long a rank waits for the others in one collective before it gives up
_TIMEOUT = datetime.timedelta(minutes=30)
_SIOCGIFADDR = 0x8915  # Linux: address of an interface


@contextlib.contextmanager
def process_group(rank: int, world: int, rendezvous: str | None, device: torch.device) -> Iterator[None]:
    """Be ``rank`` of ``world`` while inside; nothing at all for a world of one.

    ``rendezvous`` is ``host:port`` of rank 0. Tensors of a CUDA device go through NCCL, everything on the CPU (and
    every small figure) through gloo.
    """
    if world == 1:
        yield
        return
    if rendezvous is None:
        raise ValueError(f"rank {rank} of {world} needs a rendezvous address")
    bind_to_interface_of(rendezvous.rpartition(":")[0])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    finally:
        # Also on the way out of an error: closing the connections is what frees the peers from their collectives.
        dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nobody listens at.

    It is none of those that outgoing connections are given (from 32768 on): any of them could take it before a rank
    listens there.

    Raises:
        OSError: none of some tens is free.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_768), 50):  # seeded generators stay as they are
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(errno.EADDRINUSE, "no free port among 50 between 20000 and 32767")


def bind_to_interface_of(host: str) -> None:
    """Make gloo and NCCL talk through the network interface that owns ``host``, if it is one of this machine.

    Left alone, gloo resolves the machine's own name, which many containers cannot. A user's own setting wins.
    """
    try:
        wanted = socket.gethostbyname(host)
    except OSError:
        return  # joining will say so, with the address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == wanted:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
                return


def global_sum(values: Sequence[float]) -> list[float]:
    """Each value summed over all ranks in float64; the same bits on every rank."""
    return _reduce(values, dist.ReduceOp.SUM)


def global_max(values: Sequence[float]) -> list[float]:
    """Each value's maximum over all ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Sequence[float], operation: Any) -> list[float]:
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_first_rank(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def world_size() -> int:
    """Ranks in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    gather_objects(None)  # dist.barrier picks the device's backend, this one always the CPU's
