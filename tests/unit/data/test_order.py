"""The epoch order: a permutation, pure, unrelated between epochs and seeds, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.order import epoch_permutation

RECORD = ([0, 7, 8, 2, 5, 9, 4, 6, 3, 1], [7, 0, 3, 6, 4, 5, 1, 8, 2, 9])


@given(n=st.integers(0, 500), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_is_a_pure_permutation(n: int, seed: int, epoch: int) -> None:
    order = epoch_permutation(n, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, epoch_permutation(n, seed, epoch))


def test_the_order_of_record() -> None:
    # Written down so that a change of the algorithm cannot pass unnoticed: it would break every resumed run.
    assert epoch_permutation(10, 0, 0).tolist() == RECORD[0]
    assert epoch_permutation(10, 7, 3).tolist() == RECORD[1]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0), (2, 5)])
def test_epochs_and_seeds_are_unrelated(seed: int, epoch: int) -> None:
    n = 2000
    first, other = epoch_permutation(n, 0, 0), epoch_permutation(n, seed, epoch)
    # Two random permutations agree in one place on average (Poisson): more than 8 has probability 1e-6.
    assert int((first == other).sum()) <= 8
    # Spearman correlation of unrelated orders has standard deviation 1/sqrt(n) = 0.022; 5 of them.
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.112


def test_neighbours_are_spread() -> None:
    steps = np.diff(epoch_permutation(5000, 3, 0))
    # Expected (n-1) * 2/n neighbours that stay neighbours: about 2; above 12 has probability 1e-6.
    assert int((np.abs(steps) == 1).sum()) <= 12
