"""What every policy keeps to, whoever plays it: one rank in this process, actors of verl's worker groups, a table."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from posttrain_lib.compute.ray_failures import WorkerLostError
from posttrain_lib.errors import DataError, TrainingError
from posttrain_lib.losses.policy import PolicyLoss
from tests.support.launched import wait_for
from tests.support.played_models import Player, on_actors, player
from tests.support.policy_jobs import actors, random_samples, too_long_sample

if TYPE_CHECKING:
    from posttrain_lib.rl.roles import PolicyRole
    from posttrain_lib.schema.reports import StepReport

#: two ranks sum gradients in another order than one, in float32; Adam divides by what may be small
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def kept(policy: PolicyRole) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy.weights()}


@dataclass
class Seen:
    """What a policy said and did over two updates, and what came back of its checkpoint."""

    logprobs: list[list[np.ndarray]]
    of_reference: list[np.ndarray]
    reports: list[StepReport]
    weights: dict[str, torch.Tensor]


def watched(player: Player, work: str) -> Seen:
    """Two updates, a checkpoint, and the same again from there, which the asserts compare bit for bit."""
    job, batches = player.job(work), [random_samples(seed, reference=True) for seed in range(2)]
    with player.made(job) as (policy, reference):
        assert policy.version == 0 and policy.resume() is None
        stored = load_file(Path(job.model_folder) / "model.safetensors")
        first = kept(policy)
        assert first.keys() == stored.keys()
        assert all(torch.equal(value, stored[name]) for name, value in first.items())
        assert policy.logprobs([]) == []
        logprobs = [policy.logprobs(batches[0]), policy.logprobs(batches[0], temperature=2.0)]
        of_reference = reference.logprobs(batches[0])
        reports = [policy.update(batch) for batch in batches]
        assert policy.version == 2
        logprobs.append(policy.logprobs(batches[0]))
        weights = kept(policy)
        np.testing.assert_array_equal(np.concatenate(reference.logprobs(batches[0])), np.concatenate(of_reference))
        policy.save({"batch": 2}, reports[-1], wait=True)
        result = policy.result()
        assert result.step == 2 and Path(result.last_checkpoint).is_dir()
    with player.made(job) as (policy, _):
        assert policy.resume() == ({"batch": 2}, reports[-1]) and policy.version == 2
        again = kept(policy)
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
        for left, right in zip(policy.logprobs(batches[0]), logprobs[-1], strict=True):
            np.testing.assert_array_equal(left, right)
    return Seen(logprobs, of_reference, reports, weights)


def test_a_policy_learns_and_goes_on_from_its_checkpoint(played: Player, request: pytest.FixtureRequest) -> None:
    seen = watched(played, request.node.name)
    for sample, found in zip(random_samples(0, reference=True), seen.logprobs[0], strict=True):
        assert found.dtype == np.float32 and found.shape == (int(sample.trained.sum()),)
    for left, right in zip(seen.of_reference, seen.logprobs[0], strict=True):
        np.testing.assert_array_equal(left, right)  # the same model
    assert not np.array_equal(np.concatenate(seen.logprobs[0]), np.concatenate(seen.logprobs[1]))
    assert not np.allclose(np.concatenate(seen.logprobs[0]), np.concatenate(seen.logprobs[2]), atol=1e-3)


@pytest.mark.slow
def test_two_actors_learn_as_one_process(models: Path, own_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain_lib.adapters.verl_roles._CHUNK_BYTES", 1500)  # less than a tensor, and no multiple
    alone, both = watched(player("here", models), "one"), watched(player("actors", models), "two")
    for left, right in zip([*alone.logprobs, alone.of_reference], [*both.logprobs, both.of_reference], strict=True):
        np.testing.assert_allclose(np.concatenate(left), np.concatenate(right), **NEAR)
    for one, two in zip(alone.reports, both.reports, strict=True):
        assert (one.step, one.real_tokens, one.trained_weight) == (two.step, two.real_tokens, two.trained_weight)
        assert (one.loss, one.grad_norm) == pytest.approx((two.loss, two.grad_norm), rel=1e-5)
        assert one.figures == pytest.approx(two.figures, rel=1e-4, abs=1e-6)
    for name, value in alone.weights.items():
        torch.testing.assert_close(both.weights[name], value, **NEAR)


def test_a_sample_that_does_not_fit_is_named(played: Player, request: pytest.FixtureRequest) -> None:
    job = played.job(request.node.name)
    with played.made(job) as (policy, _), pytest.raises(DataError, match="does not fit into a packed row"):
        policy.update([too_long_sample()])


class FailsOnRankOne(PolicyLoss):
    """A loss that one rank cannot compute."""

    def __call__(self, model: Any, batch: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("one rank's own trouble")
        return super().__call__(model, batch)


@pytest.mark.slow
def test_what_one_rank_raises_is_told_with_its_rank(
    models: Path, own_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    loss = "tests.contracts.test_policy_role:FailsOnRankOne"
    job = player("actors", models).job("fails", loss=loss, loss_options={})
    with on_actors(job) as (policy, _), pytest.raises(TrainingError, match="worker 1 failed: RuntimeError") as caught:
        policy.update(random_samples(0))
    assert "one rank's own trouble" in str(caught.value) and caught.value.where.startswith("rank 1")
    assert "--- rank 1 failed" in capfd.readouterr().err


def test_a_lost_actor_is_said_and_none_is_left(models: Path, own_ray: None) -> None:
    with on_actors(player("actors", models).job("lost")) as (policy, _):
        assert len(actors()) == 2
        os.kill(actors()[1], signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="died"):
            policy.logprobs(random_samples(0))
    wait_for(lambda: not actors(), 120, "the other actor to end")
