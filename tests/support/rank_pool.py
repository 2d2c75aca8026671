"""Processes that stay up for many distributed checks, for importing torch takes each of them seconds."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from posttrain_lib.parallel.process_group import free_port, process_group

Result = TypeVar("Result")
#: a rank that died leaves the others waiting
_SECONDS = 240


class RankPool:
    """``most`` processes, each of which keeps its rank: torch remembers where in a device mesh it stood."""

    def __init__(self, most: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, mp_context=spawn) for _ in range(most)]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def run(self, world: int, function: Callable[..., Result], *args: Any) -> list[Result]:
        """``function(rank, *args)`` of a module, inside a gloo group of ``world`` ranks; every rank's result."""
        return self.each(world, _in_group, world, f"127.0.0.1:{free_port()}", function, *args)

    def each(self, world: int, function: Callable[..., Result], *args: Any) -> list[Result]:
        """``function(rank, *args)`` on ``world`` processes, without a group."""
        running = [pool.submit(function, rank, *args) for rank, pool in enumerate(self._pools[:world])]
        return [done.result(timeout=_SECONDS) for done in running]


def _in_group(rank: int, world: int, rendezvous: str, function: Callable[..., Result], *args: Any) -> Result:
    torch.set_num_threads(1)
    try:
        with process_group(rank, world, rendezvous, torch.device("cpu")):
            return function(rank, *args)
    finally:
        gc.collect()  # what is laid over ranks stands in cycles and holds its groups, each with threads that poll
