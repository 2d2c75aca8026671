"""SplitMix64 over tensors: numbers without any pattern for places, and mixtures in which every bit counts everywhere.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from __future__ import annotations

from torch import Tensor

#: 2^64 over the golden ratio, as a signed number: what its state grows by
STEP = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


def mixed_(numbers: Tensor) -> Tensor:
    """The finaliser on int64 of any shape, in place: one to one, modulo 2^64. ``mixed_(n * STEP)`` is the generator's
    n-th number from seed 0."""
    for shift, factor in _ROUNDS:
        # a signed shift brings copies of the sign in from above
        numbers.bitwise_xor_((numbers >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return numbers
