"""Means with 95% intervals: the percentile bootstrap over examples (Efron 1979), seeded.

The unit is the example, so the interval says how much a metric would move with other examples of the same kind. It says
nothing of another training run. Where every example has the same score (all right, or all wrong) no resampling can
tell the spread, and the interval is that one value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 1000
#: numbers drawn at a time; bounds memory
_DRAWN_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over ``examples`` examples and its 95% interval; the interval is None for fewer than two examples."""

    mean: float
    low: float | None
    high: float | None
    examples: int


@dataclass(frozen=True, eq=False)
class Scores:
    """One metric's score of each of n examples.

    Args:
        values: float64 [n]. weights: float64 [n], of the mean; None: all 1. Examples of weight 0 count for nothing.
        groups: the group of each example, [n], as the source that a document is from.
        better: which way is better.
        unit: "share" of something, 0 to 1; "nats"; or "".
        exponential: the metric is exp of the weighted mean (perplexity).
        baseline: what a trivial answer would give, as ("majority", 0.3).
    """

    values: Floats
    weights: Floats | None = None
    groups: tuple[str, ...] | None = None
    better: Literal["higher", "lower"] = "higher"
    unit: Literal["share", "nats", ""] = ""
    exponential: bool = False
    baseline: tuple[str, float] | None = None

    def of_group(self, group: str) -> Scores:
        """The same of one group alone; the baseline is that of all, and left out."""
        assert self.groups is not None
        own = np.array([name == group for name in self.groups], dtype=bool)
        weights = None if self.weights is None else self.weights[own]
        return replace(self, values=self.values[own], weights=weights, groups=None, baseline=None)

    @property
    def mean(self) -> float | None:
        """The metric over all examples of weight; None where there is none."""
        kept = self.filled() > 0
        return _mean(self, kept) if kept.any() else None

    def by_itself(self) -> list[float]:
        """The metric of each example alone."""
        return (np.exp(self.values) if self.exponential else self.values).tolist()

    def filled(self) -> Floats:
        """The weights, float64 [n]."""
        return np.ones(len(self.values)) if self.weights is None else self.weights


def estimate(scores: Scores, seed: int, resamples: int = RESAMPLES) -> Estimate | None:
    """Mean and interval; None without an example of weight."""
    kept = scores.filled() > 0
    if not kept.any():
        return None
    (samples,) = _resampled([scores], kept, seed, resamples)
    return _estimate(_mean(scores, kept), samples, int(kept.sum()))


def difference(before: Scores, after: Scores, seed: int, resamples: int = RESAMPLES) -> Estimate | None:
    """``after`` minus ``before`` of the same examples in the same order, with the paired bootstrap's interval: each
    resample takes an example with both its scores, so what makes it hard for both leaves the interval alone.

    Raises:
        ValueError: not the same number of examples.
    """
    if len(before.values) != len(after.values):
        raise ValueError(f"scores of {len(before.values)} examples before and of {len(after.values)} after")
    kept = (before.filled() > 0) & (after.filled() > 0)
    if not kept.any():
        return None
    earlier, later = _resampled([before, after], kept, seed, resamples)
    return _estimate(_mean(after, kept) - _mean(before, kept), later - earlier, int(kept.sum()))


def _estimate(mean: float, samples: Floats, examples: int) -> Estimate:
    if examples < 2:
        return Estimate(mean, None, None, examples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), examples)


def _mean(scores: Scores, kept: NDArray[np.bool_]) -> float:
    weights = scores.filled()[kept]
    mean = float((scores.values[kept] * weights).sum() / weights.sum())
    return float(np.exp(mean)) if scores.exponential else mean


def _resampled(several: list[Scores], kept: NDArray[np.bool_], seed: int, resamples: int) -> list[Floats]:
    """The metric of each, [resamples], on the same examples drawn with replacement."""
    draw = np.random.default_rng(seed)
    count = int(kept.sum())
    parts = [((scores.values * scores.filled())[kept], scores.filled()[kept]) for scores in several]
    means = [np.empty(resamples) for _ in several]
    rows = max(1, _DRAWN_AT_ONCE // count)
    for first in range(0, resamples, rows):
        chosen = draw.integers(0, count, (min(rows, resamples - first), count))
        for mean, (sums, weights) in zip(means, parts, strict=True):
            mean[first : first + rows] = sums[chosen].sum(axis=1) / weights[chosen].sum(axis=1)
    return [np.exp(mean) if scores.exponential else mean for mean, scores in zip(means, several, strict=True)]
