"""Intervals: they cover, they pair, they are seeded. Means: they are the weighted ones."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest

from posttrain_lib.evaluation import bootstrap
from posttrain_lib.evaluation.bootstrap import Scores, difference, estimate
from posttrain_lib.evaluation.comparison import compare, figure_rows


def test_the_mean_is_weighed_and_examples_of_no_weight_do_not_count() -> None:
    found = estimate(Scores(np.array([1.0, 4.0, 100.0]), np.array([3.0, 1.0, 0.0])), seed=0)
    assert found is not None
    assert found.mean == pytest.approx(1.75, rel=1e-12) and found.examples == 2
    assert found.low is not None and found.high is not None and 1.0 <= found.low < found.mean < found.high <= 4.0
    assert estimate(Scores(np.array([1.0]), np.array([0.0])), seed=0) is None
    assert estimate(Scores(np.array([0.5])), seed=0) == bootstrap.Estimate(0.5, None, None, 1)


def test_perplexity_is_exp_of_the_mean_and_so_is_its_interval() -> None:
    values, weights = np.array([1.0, 2.0, 2.5]), np.array([5.0, 1.0, 2.0])
    plain, exponential = (estimate(Scores(values, weights, exponential=e), seed=3) for e in (False, True))
    assert plain is not None and exponential is not None and plain.low is not None and plain.high is not None
    assert exponential.mean == pytest.approx(math.exp(plain.mean), rel=1e-12)
    # not exactly: a quantile between two resamples is interpolated before exp in one and behind it in the other
    assert exponential.low == pytest.approx(math.exp(plain.low), rel=1e-3)


def test_the_interval_covers() -> None:
    """Of 300 data sets of 100 draws from a skewed distribution of known mean, about 95% of the intervals hold it."""
    random = np.random.default_rng(0)
    held = 0
    for number in range(300):
        found = estimate(Scores(random.exponential(2.0, 100)), seed=number, resamples=400)
        assert found is not None and found.low is not None and found.high is not None
        held += found.low <= 2.0 <= found.high
    # The percentile interval of 100 skewed draws covers about 93%; 3.5 standard errors of 300 trials are 5 points.
    assert 0.88 <= held / 300 <= 0.99


def test_the_paired_interval_is_narrow_where_examples_differ_more_than_the_models() -> None:
    random = np.random.default_rng(1)
    hardness = random.normal(0, 10, 50)
    before, after = Scores(hardness), Scores(hardness + 1 + random.normal(0, 0.1, 50))
    found = difference(before, after, seed=0)
    assert found is not None and found.low is not None and found.high is not None
    assert 0.9 < found.low < 1.0 < found.high < 1.1  # 0.1 / sqrt(50) is 0.014; unpaired, 2.8
    with pytest.raises(ValueError, match="50 examples before and of 1 after"):
        difference(before, Scores(np.array([1.0])), seed=0)


def test_seeded_and_the_same_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Scores(np.random.default_rng(2).random(40))
    assert estimate(scores, seed=5) == estimate(scores, seed=5) != estimate(scores, seed=6)
    whole = estimate(scores, seed=5)
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 100)
    assert estimate(scores, seed=5) == whole


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_score_that_is_no_number_makes_nothing_better_or_worse(better: Literal["higher", "lower"]) -> None:
    before, after = (Scores(np.array([1.0, value, 3.0]), better=better) for value in (2.0, math.nan))
    assert [row["verdict"] for row in compare("task", {"it": before}, {"it": after}, seed=0)] == ["unclear"]


def test_rows_of_a_comparison_per_group_and_their_verdicts() -> None:
    groups = ("a",) * 30 + ("b",) * 30
    random = np.random.default_rng(3)
    before = random.random(60)
    fell = before - np.where(np.arange(60) < 30, 0.5, 0.0) + random.normal(0, 0.05, 60)
    rows = compare(
        "t", {"loss": Scores(before, groups=groups, better="lower")},
        {"loss": Scores(fell, groups=groups, better="lower"), "win": Scores(np.ones(3), baseline=("coin", 0.5))}, 0,
    )  # fmt: skip
    assert [(row["metric"], row["group"], row["verdict"]) for row in rows] == [
        ("loss", "all", "better"), ("loss", "a", "better"), ("loss", "b", "unclear"), ("win", "all", ""),
    ]  # fmt: skip
    assert rows[1]["difference"]["mean"] == pytest.approx(fell[:30].mean() - before[:30].mean(), rel=1e-12)
    assert rows[1]["before"]["examples"] == 30
    assert rows[3]["before"] is None and rows[3]["baseline"] == ["coin", 0.5]
    worse = compare("t", {"m": Scores(before + 9)}, {"m": Scores(before)}, 0)
    assert worse[0]["verdict"] == "worse"


def test_a_loss_s_own_figures_have_no_interval() -> None:
    (row,) = figure_rows({"rewards/margin": 0.0}, {"rewards/margin": 1.5}, 7)
    assert row["difference"] == {"mean": 1.5, "low": None, "high": None, "examples": 7}
    assert row["verdict"] == "" and row["metric"] == "rewards/margin"
