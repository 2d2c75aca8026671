"""What the packing benchmark counts by: its sets, delays and the sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posttrain_lib.data.store_feed import StoreFeed
from tests.benchmarks.packing_data import (
    HEAVY_TAILED,
    LOG_NORMAL,
    LengthSet,
    checksums,
    delays,
    generated_store,
    order_of,
    statistics_of,
    systematic_sample,
)


@pytest.mark.parametrize(
    ("law", "mean", "longest_fill", "batch_fill"),
    [(LOG_NORMAL, 487, 0.119, 0.333), (HEAVY_TAILED, 551, 0.067, 0.218)],
    ids=["log-normal", "heavy-tailed"],
)
def test_the_sets_are_those_of_the_figures_in_the_field(
    law: LengthSet, mean: float, longest_fill: float, batch_fill: float
) -> None:
    found = statistics_of(law.lengths(50_000), law.cap)
    # The figures are given to three digits.
    assert found["mean"] == pytest.approx(mean, abs=0.5)
    assert found["fill_padded_to_cap"] == pytest.approx(longest_fill, abs=5e-4)
    assert found["fill_padded_in_batches_of_8"] == pytest.approx(batch_fill, abs=5e-4)
    assert found["longest"] == law.cap and law.lengths(50_000).min() >= 8


def test_a_delay_is_counted_from_the_row_before_which_a_unit_came() -> None:
    # Units 0 and 1 wait before the first row, one more comes before each further one; unit 1 is passed over twice.
    rows, taken = [(0,), (2,), (1, 3)], np.array([2, 3, 4])
    assert delays(np.arange(4), rows, taken).tolist() == [0, 2, 0, 0]
    # Of another name, in order of arrival: the same.
    names = np.array([2, 3, 1, 0])
    assert delays(names, [(2,), (1,), (3, 0)], taken).tolist() == [0, 2, 0, 0]


def test_the_sample_keeps_the_law() -> None:
    lengths = LOG_NORMAL.lengths(20_000)
    chosen = systematic_sample(lengths, 10)
    assert len(chosen) == len(set(chosen.tolist())) == 2000
    # One of each ten neighbours in length: the means differ by the tail's curvature alone.
    assert lengths[chosen].mean() == pytest.approx(lengths.mean(), rel=0.01)


def test_the_store_holds_the_lengths_and_the_order_visits_each_once(tmp_path: Path) -> None:
    lengths = LOG_NORMAL.lengths(300)
    store = generated_store(tmp_path, lengths)
    assert np.array_equal(store.lengths, lengths)
    assert checksums(store).tolist() == [int(store.get(number)[0].sum()) for number in range(300)]
    order = order_of(StoreFeed(store, row_tokens=LOG_NORMAL.cap, epochs=1))
    assert sorted(order.tolist()) == list(range(300))
