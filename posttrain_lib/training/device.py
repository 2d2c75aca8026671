"""The device of a rank, its threads, its random numbers and its memory."""

from __future__ import annotations

import contextlib
import os
import random
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from posttrain_lib.errors import ConfigError


def pick_device(wanted: str, rank: int) -> torch.device:
    """``auto`` is CUDA where there is one. Each rank of a machine takes its own CUDA device.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device", where="compute.device", got=wanted, fix="use auto or cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def reproducible(seed: int, threads: int | None) -> Iterator[None]:
    """Everything that decides a run's bits besides its data: seeds, thread count, deterministic kernels.

    Sums over threads are rounded by their number, so it is fixed. Operations without a deterministic kernel warn
    and run. Threads and the deterministic switch go back to what they were; a job may run in a longer process.
    """
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), _fills_memory())
    # Read by cuBLAS when its handle is made; without it, its sums depend on the workspace it happens to get.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if threads is not None:
        torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The switch also fills every torch.empty with NaN, a debugging aid that costs a pass over each buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def _fills_memory() -> bool:
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 products over fp32 weights, or nothing.

    No cache of cast weights: each is used once a forward, and with sharding the cache would keep whole copies of
    weights that were meant to be freed.
    """
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process, JSON-ready."""
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    twister = numpy_state["state"]
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [twister["key"].tolist(), twister["pos"], numpy_state["has_gauss"], numpy_state["gauss"]],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`rng_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_unhex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unhex(state["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on CUDA, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
