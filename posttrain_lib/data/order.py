"""The order in which an epoch visits its examples: a pure function of (n, seed, epoch).

The permutation does not come from a library's ``shuffle``, whose algorithm may change between versions, but from a
keyed hash (the SplitMix64 finaliser) of each index, sorted. It is the same on every machine and for ever.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(n)``, int64 [n]; other seeds and other epochs give unrelated ones.

    Source of the hash: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. It is a bijection
    on 64 bits, so no two indices ever tie.
    """
    key = _mix_number(_mix_number(seed & _MASK) ^ ((epoch * _GOLDEN) & _MASK))
    with np.errstate(over="ignore"):
        keys = _mix(np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_number(value: int) -> int:
    with np.errstate(over="ignore"):
        return int(_mix(np.array([(value + _GOLDEN) & _MASK], dtype=np.uint64))[0])
