"""The device of a rank, its threads, its random numbers and its memory."""

from __future__ import annotations

import contextlib
import random
import resource
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch


def pick_device(wanted: str, rank: int) -> torch.device:
    """``auto`` is CUDA where there is one. Each rank of a machine takes its own CUDA device."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def prepare_process(seed: int, threads: int | None) -> None:
    """Seed every generator and fix the thread count: sums over threads are rounded by their number."""
    if threads is not None:
        torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 products over fp32 weights, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on CUDA, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
