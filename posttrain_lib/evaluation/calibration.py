"""How far a reward model's scores of held-out pairs can be believed: do the labelled winners win, and as often as the
scores say?

A pair's two scores make a probability under Bradley-Terry, ``s(chosen - rejected)``: that the labelled winner wins. A
label says which answer won and not which stands first, so a calibration over that number alone would see one outcome
only. Each pair is therefore taken in both orders: the chosen one first (probability p, it won) and the rejected one
first (1 - p, it did not).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from posttrain_lib.evaluation.bootstrap import Scores, estimate
from posttrain_lib.evaluation.comparison import compare, point_row
from posttrain_lib.evaluation.scoring import score_documents

if TYPE_CHECKING:
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.models.decoder import Decoder

Floats = NDArray[np.float64]

#: equal parts of 0 to 1
BINS = 10
#: of the task "held_out" of a reward model, besides the loss and its figures
METRICS = ("pair_accuracy", "brier_score", "calibration_error")


@dataclass(frozen=True, eq=False)
class PairScores:
    """``chosen`` and ``rejected``: the scores of P pairs' documents, float64 [P]. ``sources``: of each pair, [P]."""

    chosen: Floats
    rejected: Floats
    sources: tuple[str, ...]

    @property
    def probabilities(self) -> Floats:
        """[P]: of each labelled winner to win."""
        return 0.5 * (1.0 + np.tanh(0.5 * (self.chosen - self.rejected)))  # the logistic function, without overflow


@dataclass(frozen=True)
class Bin:
    """The predictions from ``low`` to ``high``, of ``count`` of the pairs: their mean, and the share that came true;
    both None where there are none."""

    low: float
    high: float
    count: int
    predicted: float | None
    observed: float | None


def score_pairs(model: Decoder, store: TokenStore, row_tokens: int) -> PairScores:
    """The scores of a store of pairs, ``row_tokens`` in one forward; raises as ``score_documents``."""
    scores = score_documents(model, [store.get(example)[0] for example in range(len(store))], row_tokens)
    sources = tuple(store.source(example) for example in range(0, len(store), 2))
    return PairScores(scores[0::2].astype(np.float64), scores[1::2].astype(np.float64), sources)


def pair_metrics(pairs: PairScores) -> dict[str, Scores]:
    """What is a mean over pairs: ``pair_accuracy``, the share whose labelled winner has the higher score (a tie counts
    as wrong), and ``brier_score``, the mean of ``(1 - p)^2``, which is the same in both orders (Brier 1950)."""
    right = (pairs.chosen > pairs.rejected).astype(np.float64)
    squares = np.square(1.0 - pairs.probabilities)
    return {
        "pair_accuracy": Scores(right, groups=pairs.sources, unit="share", baseline=("a coin", 0.5)),
        "brier_score": Scores(squares, groups=pairs.sources, better="lower", baseline=("always 1/2", 0.25)),
    }


def reliability(pairs: PairScores) -> list[Bin]:
    """The predictions of both orders in :data:`BINS` bins; a number on a border belongs to the upper one. The lower
    half mirrors the upper one."""
    p = pairs.probabilities
    predicted, won = np.concatenate([p, 1.0 - p]), np.repeat([1.0, 0.0], len(p))
    number = np.minimum((predicted * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(number, minlength=BINS)
    sums = [np.bincount(number, values, minlength=BINS) for values in (predicted, won)]
    means = [[total / count if count else None for total, count in zip(each, counts, strict=True)] for each in sums]
    return [
        Bin(place / BINS, (place + 1) / BINS, int(count), *of_bin)
        for place, (count, *of_bin) in enumerate(zip(counts, *means, strict=True))
    ]


def calibration_error(bins: list[Bin]) -> float:
    """The expected calibration error (Guo et al. 2017, eq. 3): the mean of ``|observed - predicted|`` over the bins,
    weighed by their counts. 0 for no pairs. It has no interval here: noise only adds to a sum of sizes, so resampled
    ones lie above it."""
    filled = [(one.count, one.observed, one.predicted) for one in bins]
    gaps = [n * abs(won - said) for n, won, said in filled if won is not None and said is not None]
    return float(sum(gaps) / max(1, sum(one.count for one in bins)))


def calibration_of(pairs: PairScores, seed: int) -> dict[str, Any]:
    """Plain values: ``pairs``, ``pair_accuracy`` ({mean, low, high, examples}, the 95% interval by resampling pairs),
    ``brier_score`` likewise, ``calibration_error`` and ``bins``."""
    bins = reliability(pairs)
    means = {name: estimate(scores, seed) for name, scores in pair_metrics(pairs).items()}
    return {
        "pairs": len(pairs.chosen),
        **{name: None if found is None else vars(found) for name, found in means.items()},
        "calibration_error": calibration_error(bins),
        "bins": [vars(one) for one in bins],
    }


def calibration_rows(before: PairScores, after: PairScores, seed: int) -> list[dict[str, Any]]:
    """Rows of ``evaluation.comparison`` for :data:`METRICS`."""
    earlier, later = (calibration_error(reliability(pairs)) for pairs in (before, after))
    return [
        *compare("held_out", pair_metrics(before), pair_metrics(after), seed),
        point_row("calibration_error", earlier, later, len(after.chosen), better="lower"),
    ]
