"""Rows dealt out to ranks: all of them, equally many, and about equally dear."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.balance import deal_out, imbalance


@given(costs=st.lists(st.floats(0, 1e6), min_size=1, max_size=10), ranks=st.integers(1, 5))
def test_every_row_once_and_equally_many(costs: list[float], ranks: int) -> None:
    dealt = deal_out(np.repeat(costs, ranks), ranks)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(costs) * ranks))
    assert {len(rows) for rows in dealt} == {len(costs)}
    for rows in dealt if ranks > 1 else ():
        assert [costs[row // ranks] for row in rows] == sorted((costs[row // ranks] for row in rows), reverse=True)


def test_dear_rows_do_not_meet() -> None:
    costs = np.array([100, 100, 1, 1, 1, 1, 50, 50.0])
    dealt = deal_out(costs, 2)
    assert [sum(costs[rows]) for rows in dealt] == [152, 152]
    assert imbalance(costs, dealt) == 1.0


def test_swaps_mend_what_the_greedy_deal_leaves() -> None:
    # Dealt greedily 7+4+3 against 6+5+2; swapping 4 and 5... the sums meet only after an exchange.
    costs = np.array([8.0, 7, 6, 5, 4, 2])
    greedy_best = deal_out(costs, 2)
    assert imbalance(costs, greedy_best) == 1.0


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.5])
def test_ranks_of_packed_rows_finish_together(spread: float) -> None:
    """Eight ranks of eight rows; costs as wide as packed rows of log-normal documents have them."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = np.minimum(rng.lognormal(0, spread, 64), 8)
        assert imbalance(costs, deal_out(costs, 8)) <= 1.02 + max(0.0, costs.max() * 8 / costs.sum() - 1)


def test_rows_that_cannot_be_dealt_out_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows"):
        deal_out(np.ones(5), 2)
