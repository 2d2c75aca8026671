"""The chance that one of k sampled completions is right, from more of them than k."""

from __future__ import annotations

import numpy as np


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The share of sets of k of the ``samples`` that hold one of the ``right`` ones: the unbiased estimate of the
    chance that one of k is right, ``1 - C(n-c, k) / C(n, k)`` (Chen et al. 2021, equation 1).

    Raises:
        ValueError: not 1 <= k <= samples, or not 0 <= right <= samples.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {right} of them right")
    if samples - right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - right + 1, samples + 1)))
