"""The epoch order: a permutation, pure, unrelated between epochs and seeds, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.order import (
    epoch_permutation,
    row_keys,
    source_seed,
    window_bounds,
    window_size,
    windowed_order,
)

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


FILES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(file_rows=FILES, window=st.integers(1, 50), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_windows_hold_the_rows_of_the_files_in_turn(file_rows: list[int], window: int, seed: int, epoch: int) -> None:
    """What a reader sees who opens one file after the other, window by window, each shuffled by the rows' keys."""
    file = np.repeat(np.arange(len(file_rows)), file_rows)
    row = np.concatenate([np.arange(rows) for rows in file_rows])
    order = windowed_order(file, row, np.array(file_rows), window, seed, epoch)
    read = [(f, r) for f in epoch_permutation(len(file_rows), seed, epoch).tolist() for r in range(file_rows[f])]
    found = list(zip(file[order].tolist(), row[order].tolist(), strict=True))
    at, number = 0, 0
    while at < len(read):
        end = at + window_size(number, window)
        assert set(found[at:end]) == set(read[at:end])
        keys = [int(row_keys(f, np.array([r]), seed, epoch)[0]) for f, r in found[at:end]]
        assert keys == sorted(keys) and len(set(keys)) == len(keys)
        at, number = end, number + 1


@given(rows=st.integers(0, 5000), window=st.integers(1, 600))
def test_windows_grow_to_their_size(rows: int, window: int) -> None:
    bounds = window_bounds(rows, window)
    sizes = np.diff(bounds).tolist()
    assert bounds[0] == 0 and bounds[-1] == rows
    assert sizes[:-1] == [window_size(number, window) for number in range(len(sizes) - 1)]
    assert all(size <= window for size in sizes)
    assert sizes[:-1] == sorted(sizes[:-1])


def test_units_of_refused_rows_leave_the_others_where_they_were() -> None:
    file, row = np.zeros(300, np.int64), np.arange(300)
    everything = windowed_order(file, row, np.array([300]), 50, 1, 0)
    kept = np.flatnonzero(row % 7 != 3)
    some = windowed_order(file[kept], row[kept], np.array([300]), 50, 1, 0)
    assert row[kept][some].tolist() == [r for r in everything.tolist() if r % 7 != 3]


def test_sources_of_a_mixture_have_seeds_of_their_own() -> None:
    assert len({source_seed(3, name) for name in ("a", "b", "ab", "ba", "")}) == 5
