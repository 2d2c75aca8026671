"""Memory for a step's arrays, used again once nothing refers to it any more.

Fresh megabytes cost a page fault for every 4 KiB and are in no cache: laying tokens out in memory that was just used is
a seventh faster (``tests/benchmarks/packing.py``).
"""

from __future__ import annotations

import weakref
from collections import deque
from functools import lru_cache

import numpy as np

#: blocks of one size that wait to be used again: what a loader holds ahead, and some that its caller gave back
_KEPT = 4
#: sizes of which blocks are kept: training's batches, those of its evaluation, and their indices
_SIZES = 8


def recycled(size: int) -> np.ndarray:
    """int32 [size] of whatever the memory holds. It goes back when the last view or tensor of it is gone."""
    waiting = _waiting(size)
    try:
        block = waiting.pop()
    except IndexError:
        block = np.empty(size, np.int32)
    # An array over the block's buffer, not a view of the block: numpy makes views of a view refer to the block itself,
    # and only what everybody refers to can tell when everybody is gone.
    array = np.frombuffer(memoryview(block), np.int32)
    weakref.finalize(array, waiting.append, block).atexit = False
    return array


@lru_cache(maxsize=_SIZES)
def _waiting(size: int) -> deque[np.ndarray]:
    return deque(maxlen=_KEPT)
