"""What every frozen model keeps to, whoever plays it: as the policy was at first, whatever the policy becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from posttrain_lib.errors import DataError
from posttrain_lib.rl.constraints import Trie
from posttrain_lib.schema.rollouts import TrainSample
from tests.support.played_models import Player, player
from tests.support.policy_jobs import random_samples, too_long_sample

#: how samples are packed changes the order of float32 sums; log-probabilities are around -4
NEAR = {"rtol": 1e-5, "atol": 1e-5}
CATALOGUE, END = [(3, 4, 5), (3, 9)], 63


def assert_equal(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> None:
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def constrained() -> list[TrainSample]:
    """An episode of two turns: each is one of the catalogue, and none of them all that a model would say."""
    tokens = np.array([7, 8, 3, 4, 5, END, 50, 51, 3, 9, END], np.int32)
    trained = np.isin(np.arange(len(tokens)), [2, 3, 4, 5, 8, 9, 10])
    return [TrainSample(tokens, trained, 2, 0, 0, {}, Trie(CATALOGUE, END))]


def test_it_stays_what_the_policy_was(played: Player, request: pytest.FixtureRequest) -> None:
    batch = random_samples(0, reference=True)
    with played.made(played.job(request.node.name)) as (policy, reference):
        at_first = reference.logprobs(batch)
        assert_equal(at_first, policy.logprobs(batch))
        for sample, found in zip(batch, at_first, strict=True):
            assert found.dtype == np.float32 and found.shape == (int(sample.trained.sum()),)
            assert np.isfinite(found).all() and (found <= 0).all()
            found += 1.0  # what is given is the caller's
        first = [found - 1.0 for found in at_first]
        policy.update(batch)
        again = reference.logprobs(batch)
        for left, right in zip(first, again, strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-6)  # added and taken away, in float32
        assert not np.allclose(np.concatenate(policy.logprobs(batch)), np.concatenate(again), atol=1e-3)
        reference.close()


def test_a_sample_is_scored_as_if_it_were_alone(played: Player, request: pytest.FixtureRequest) -> None:
    """In order, whatever stands beside it; also none at all."""
    batch = random_samples(1, groups=4, reference=True)
    with played.made(played.job(request.node.name)) as (_, reference):
        together = reference.logprobs(batch)
        backwards = reference.logprobs(batch[::-1])[::-1]
        alone = [reference.logprobs([sample])[0] for sample in batch]
        assert reference.logprobs([]) == []
    for one, other, third in zip(together, backwards, alone, strict=True):
        np.testing.assert_allclose(one, other, **NEAR)
        np.testing.assert_allclose(one, third, **NEAR)


def test_signals_are_not_read(played: Player, request: pytest.FixtureRequest) -> None:
    """A reference is asked before they are known."""
    batch = random_samples(2)
    bare = [dataclasses.replace(sample, signals={}) for sample in batch]
    with played.made(played.job(request.node.name)) as (_, reference):
        assert_equal(reference.logprobs(batch), reference.logprobs(bare))


def test_log_probabilities_are_among_what_was_allowed(played: Player, request: pytest.FixtureRequest) -> None:
    """Where one token could come, it is certain; a second turn begins at the catalogue's beginning."""
    with played.made(played.job(request.node.name)) as (policy, reference):
        (found,) = reference.logprobs(constrained())
        assert_equal([found], policy.logprobs(constrained()))
    # 3 and, behind 4 or 9, all others are the only way; behind 3 there are two
    forked = np.isin(np.arange(7), [1, 5])
    assert (found[~forked] == 0.0).all() and (found[forked] < 0.0).all()
    free = dataclasses.replace(constrained()[0], allowed=None)
    with played.made(played.job(request.node.name)) as (_, reference):
        assert (reference.logprobs([free])[0] < found - 1e-3).all()


def test_a_sample_that_does_not_fit_is_named(played: Player, request: pytest.FixtureRequest) -> None:
    with (
        played.made(played.job(request.node.name)) as (_, reference),
        pytest.raises(DataError, match="does not fit into a packed row") as told,
    ):
        reference.logprobs([too_long_sample()])
    assert told.value.where is not None and "sample 0 of group 0" in told.value.where


@pytest.mark.slow
def test_actors_say_what_one_process_says(models: Path, own_ray: None) -> None:
    batch = random_samples(3, reference=True)
    found = []
    for kind in ("here", "actors"):
        one = player(kind, models)
        with one.made(one.job(f"same-{kind}")) as (_, reference):
            found.append(reference.logprobs(batch))
    for left, right in zip(*found, strict=True):
        np.testing.assert_allclose(left, right, **NEAR)
