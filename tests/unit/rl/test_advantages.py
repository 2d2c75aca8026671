"""Advantage rules: verl's own values on the same batch, and what holds of any."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.rl.advantages import RULES, advantages_of

REWARDS = np.array([0.0, 1.0, 1.0, 0.3, -2.0, 0.5, 0.25, 0.25, 0.25])
GROUPS = np.array([4, 4, 4, 1, 1, 1, 9, 9, 9])
TOKENS = np.array([3, 7, 1, 2, 2, 5, 4, 1, 6])


def of_verl(name: str, rewards: np.ndarray, groups: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Per completion: verl gives the same number to every trained token."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    mask = (torch.arange(int(tokens.max()))[None] < torch.from_numpy(tokens)[:, None]).double()
    token_rewards = torch.zeros_like(mask)
    token_rewards[torch.arange(len(tokens)), torch.from_numpy(tokens) - 1] = torch.from_numpy(rewards)
    options = {"index": groups}
    if name == "dr_grpo":
        name, options = "grpo", {**options, "norm_adv_by_std_in_grpo": False}
    found, _ = core.get_adv_estimator_fn(name)(token_rewards, mask, config=SimpleNamespace(gamma=1.0), **options)
    assert torch.equal(found, found[:, :1] * mask)
    return found[:, 0].numpy()


@pytest.mark.parametrize("name", list(RULES))
def test_the_values_are_verls(name: str) -> None:
    # verl sums in float32 in places
    expected = of_verl(name, REWARDS, GROUPS, TOKENS)
    np.testing.assert_allclose(advantages_of(name, REWARDS, GROUPS, TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    rewards, groups, tokens = np.array([0.0, 1.0, 1.0, 5.0]), np.array([7, 7, 7, 2]), np.array([1, 1, 1, 1])
    np.testing.assert_allclose(advantages_of("dr_grpo", rewards, groups, tokens), [-2 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(advantages_of("rloo", rewards, groups, tokens), [-1, 0.5, 0.5, 0])
    spread = np.sqrt((4 / 9 + 2 / 9) / 2)
    found = advantages_of("grpo", rewards, groups, tokens)
    np.testing.assert_allclose(found, np.array([-2, 1, 1, 0]) / 3 / (spread + 1e-6))
    # whitened over tokens: the last completion counts four times
    found = advantages_of("reinforce_plus_plus", np.array([0.0, 1.0]), np.array([0, 0]), np.array([1, 4]))
    np.testing.assert_allclose(found, [-0.8 / np.sqrt(0.2), 0.2 / np.sqrt(0.2)], rtol=1e-6)


batches = st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 4), st.integers(1, 50)), min_size=1, max_size=30).map(
    lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True))
)


@pytest.mark.parametrize("name", list(RULES))
@given(batch=batches, shift=st.floats(-100, 100))
def test_what_every_reward_has_more_changes_nothing(name: str, batch, shift: float) -> None:
    rewards, groups, tokens = batch
    found = advantages_of(name, rewards, groups, tokens)
    # cancellation: 1e-14 of rewards of 100, over a deviation that is no smaller than what is added to it, 1e-6 or 1e-4
    np.testing.assert_allclose(advantages_of(name, rewards + shift, groups, tokens), found, rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(0).permutation(len(rewards))
    permuted = advantages_of(name, rewards[order], groups[order], tokens[order])
    np.testing.assert_allclose(permuted, found[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("reward", [0.1, 0.3, -7.7, 1e9 + 0.1])
def test_equal_rewards_and_single_completions_teach_nothing(name: str, reward: float) -> None:
    for count in range(2, 10):
        groups = np.arange(2 * count) // count
        equal = advantages_of(name, np.full(2 * count, reward), groups, 1 + np.arange(2 * count) % 5)
        assert not equal.any(), count
    assert advantages_of(name, np.array([3.0]), np.array([0]), np.array([1])).tolist() == [0.0]


def first_token_only(rewards: np.ndarray, groups: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return rewards[:1]


def test_bad_rules_and_rewards_are_named() -> None:
    ones = np.ones(2, dtype=np.int64)
    with pytest.raises(DataError, match="completion 1 of 2"):
        advantages_of("grpo", np.array([0.0, np.nan]), ones, ones)
    with pytest.raises(ConfigError, match="one finite number a completion"):
        advantages_of("tests.unit.rl.test_advantages:first_token_only", np.zeros(2), ones, ones)
    with pytest.raises(ConfigError, match="grpo"):
        advantages_of("gpro", np.zeros(2), ones, ones)
