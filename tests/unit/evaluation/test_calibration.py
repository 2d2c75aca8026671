"""Calibration of pair scores: by hand, against a plain count, and of a reward model's own scores of a store."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from posttrain_lib.evaluation.calibration import (
    METRICS,
    PairScores,
    calibration_error,
    calibration_of,
    calibration_rows,
    reliability,
    score_pairs,
)
from posttrain_lib.losses.contract import outcome_of, pack, write_examples
from posttrain_lib.losses.reward import RewardLoss
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.score import init_score_head, with_score_head
from tests.oracles.tiny_job import write_model


def of(*probabilities: float) -> PairScores:
    """Pairs whose labelled winners win with these probabilities."""
    p = np.array(probabilities)
    return PairScores(np.log(p / (1 - p)) + 3.0, np.full(len(p), 3.0), ("s",) * len(p))


def test_by_hand() -> None:
    # Sure four times and right three times; unsure once.
    pairs = of(0.95, 0.95, 0.95, 0.05, 0.625)
    assert pairs.probabilities == pytest.approx([0.95, 0.95, 0.95, 0.05, 0.625])
    bins = reliability(pairs)
    assert [(one.low, one.high) for one in bins] == [(k / 10, (k + 1) / 10) for k in range(10)]
    assert [one.count for one in bins] == [4, 0, 0, 1, 0, 0, 1, 0, 0, 4]
    assert (bins[9].predicted, bins[9].observed) == pytest.approx((0.95, 0.75))
    assert (bins[0].predicted, bins[0].observed) == pytest.approx((0.05, 0.25))
    assert (bins[6].predicted, bins[6].observed) == pytest.approx((0.625, 1.0))
    assert bins[4].predicted is None and bins[4].observed is None
    assert calibration_error(bins) == pytest.approx((4 * 0.2 + 1 * 0.375) / 5)
    found = calibration_of(pairs, seed=0)
    assert found["pairs"] == 5 and found["pair_accuracy"]["mean"] == 0.8
    assert found["pair_accuracy"]["low"] < 0.8 < found["pair_accuracy"]["high"] == 1.0
    assert found["brier_score"]["mean"] == pytest.approx((3 * 0.05**2 + 0.95**2 + 0.375**2) / 5)


def test_the_lower_half_mirrors_the_upper_one_and_nothing_hangs_on_the_order() -> None:
    pairs = of(*np.random.default_rng(0).uniform(0.01, 0.99, 300))
    bins = reliability(pairs)
    for lower, upper in zip(bins[:5], bins[:4:-1], strict=True):
        assert lower.count == upper.count > 0
        assert (lower.predicted, lower.observed) == pytest.approx((1 - upper.predicted, 1 - upper.observed))
    confidence = np.maximum(pairs.probabilities, 1 - pairs.probabilities)
    right, which = pairs.chosen > pairs.rejected, (confidence * 10).astype(int)
    gaps = [abs((right - confidence)[which == k].sum()) for k in range(5, 10)]
    assert calibration_error(bins) == pytest.approx(sum(gaps) / 300), "it is that of the confidence in the higher score"


def test_scores_that_mean_what_they_say_have_a_small_error() -> None:
    random = np.random.default_rng(1)
    confidence = random.uniform(0.5, 1, 20_000)
    won = random.random(20_000) < confidence
    honest = of(*np.where(won, confidence, 1 - confidence))
    assert calibration_error(reliability(honest)) < 0.02  # five bins of 4000 pairs: 0.008 of chance in each at most
    boastful = PairScores(3 * honest.chosen, 3 * honest.rejected, honest.sources)
    assert calibration_error(reliability(boastful)) > 0.1


def test_far_scores_ties_and_no_pairs() -> None:
    pairs = PairScores(np.array([900.0, -900.0, 2.0]), np.array([-900.0, 900.0, 2.0]), ("a", "b", "b"))
    assert pairs.probabilities.tolist() == [1.0, 0.0, 0.5]
    bins = reliability(pairs)
    assert (bins[9].count, bins[9].observed, bins[0].count) == (2, 0.5, 2)
    assert (bins[5].count, bins[5].observed, bins[5].predicted) == (2, 0.5, 0.5), "both orders of a tie are one number"
    assert calibration_of(pairs, 0)["pair_accuracy"]["mean"] == pytest.approx(1 / 3), "a tie counts as wrong"
    nothing = calibration_of(PairScores(np.zeros(0), np.zeros(0), ()), 0)
    assert nothing["pairs"] == 0 and nothing["pair_accuracy"] is None and nothing["calibration_error"] == 0


def test_rows_of_the_comparison() -> None:
    before, after = of(0.5, 0.4, 0.6, 0.3), of(0.9, 0.8, 0.95, 0.9)
    rows = {row["metric"]: row for row in calibration_rows(before, after, 0)}
    assert tuple(rows) == METRICS and {row["task"] for row in rows.values()} == {"held_out"}
    accuracy, brier, error = rows.values()
    assert (accuracy["before"]["mean"], accuracy["after"]["mean"]) == (0.25, 1.0) and accuracy["unit"] == "share"
    assert brier["better"] == error["better"] == "lower" and brier["verdict"] == "better"
    assert error["after"]["mean"] == pytest.approx(calibration_error(reliability(after)))
    assert error["difference"]["mean"] == pytest.approx(error["after"]["mean"] - error["before"]["mean"])
    assert error["after"]["low"] is None and error["verdict"] == "" and error["after"]["examples"] == 4


def test_the_scores_of_a_store_are_those_that_the_loss_compares(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    spec = with_score_head(spec_from_folder(folder), 63)
    model = build_model(spec)
    from posttrain_lib.checkpoint.hf import load_hf_weights

    load_hf_weights(model, spec, folder)
    init_score_head(model, spec, 0)
    store = write_examples(tmp_path / "store", "pair", seed=0)
    pairs = score_pairs(model, store, row_tokens=64)
    assert pairs.sources == ("source 0", "source 1") * 3
    items = outcome_of(RewardLoss(), model, pack(store, [tuple(range(6))], 1, share=True)).items
    losses = [float(items[2 * pair][0]) for pair in range(6)]
    # float32 forwards, packed otherwise: 1e-6 of scores of order 1
    assert losses == pytest.approx([-math.log(p) for p in pairs.probabilities], abs=1e-5)
    assert np.ptp(pairs.probabilities) > 1e-3
