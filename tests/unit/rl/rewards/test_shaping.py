"""Normalisation of rewards: by hand, and what holds of any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.rl.rewards.shaping import NORMALISATIONS, normalised, signal

batches = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(-2, 3)), min_size=0, max_size=30).map(
    lambda rows: (np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.int64))
)


def test_by_hand() -> None:
    rewards, groups = np.array([0.0, 2.0, 5.0, 5.0]), np.array([3, 3, 1, 1])
    assert normalised("none", rewards, groups).tolist() == [0, 2, 5, 5]
    assert normalised("group", rewards, groups).tolist() == [-1, 1, 0, 0]
    np.testing.assert_allclose(normalised("batch", rewards, groups), (rewards - 3) / np.sqrt(4.5))
    assert normalised("none", rewards, groups, clip=1.5).tolist() == [0, 1.5, 1.5, 1.5]
    assert signal(rewards, groups) == {3: True, 1: False}
    assert signal(np.array([]), np.array([], dtype=np.int64)) == {}


@given(batch=batches)
def test_each_group_has_mean_zero_and_deviation_one_or_none(batch) -> None:
    rewards, groups = batch
    found = normalised("group", rewards, groups)
    for group, differs in signal(rewards, groups).items():
        part = found[groups == group]
        # sums of at most 30 numbers of order 1 that went through a division by a deviation of 1e-9 or more
        assert part.mean() == pytest.approx(0, abs=1e-5)
        assert part.std() == pytest.approx(1, abs=1e-5) or not part.any()
        assert differs or not part.any()


@given(batch=batches)
def test_the_batch_has_mean_zero_and_deviation_one_or_none(batch) -> None:
    rewards, groups = batch
    found = normalised("batch", rewards, groups)
    assert found.shape == rewards.shape
    if len(found):
        # as above
        assert found.mean() == pytest.approx(0, abs=1e-5)
        assert found.std() == pytest.approx(1, abs=1e-5) or not found.any()


@pytest.mark.parametrize("name", list(NORMALISATIONS))
@given(batch=batches, clip=st.floats(0.01, 10))
def test_order_is_kept_and_the_bound_holds(name: str, batch, clip: float) -> None:
    rewards, groups = batch
    found = normalised(name, rewards, groups, clip=clip)
    assert np.isfinite(found).all() and (np.abs(found) <= clip).all()
    for group in np.unique(groups):
        assert (np.diff(found[groups == group][np.argsort(rewards[groups == group], kind="stable")]) >= 0).all()


@given(batch=batches)
def test_a_batch_in_another_order(batch) -> None:
    rewards, groups = batch
    order = np.random.default_rng(0).permutation(len(rewards))
    found = normalised("group", rewards, groups)
    # a sum in another order, over a deviation of 1e-9 or more
    np.testing.assert_allclose(normalised("group", rewards[order], groups[order]), found[order], atol=1e-5)


def test_rewards_near_the_limits_of_floats() -> None:
    for scale in (1e308, 1e-308):
        found = normalised("batch", np.array([-1.0, 1.0]) * scale, np.array([0, 0]))
        np.testing.assert_allclose(found, [-1, 1])


def test_what_is_refused() -> None:
    one = np.array([0])
    with pytest.raises(DataError, match="no number"):
        normalised("group", np.array([np.nan]), one)
    with pytest.raises(DataError, match="no number"):
        signal(np.array([np.inf]), one)
    with pytest.raises(ConfigError, match="did you mean 'group'"):
        normalised("groups", np.array([1.0]), one)
    with pytest.raises(ConfigError, match="above 0"):
        normalised("group", np.array([1.0]), one, clip=0.0)
