"""What every policy keeps to, whoever plays it: one rank in this process, and two actors of verl's worker groups."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from posttrain_lib.compute.ray_failures import WorkerLostError
from posttrain_lib.compute.ray_session import ray_session
from posttrain_lib.errors import DataError, TrainingError
from posttrain_lib.losses.policy import PolicyLoss
from posttrain_lib.rl.ranks import models_here
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.training.device import reproducible
from tests.support.launched import wait_for
from tests.support.policy_jobs import actors, policy_job, random_samples

if TYPE_CHECKING:
    from posttrain_lib.rl.roles import PolicyRole, ReferenceRole
    from posttrain_lib.schema.reports import StepReport
    from posttrain_lib.training.job import TrainJob

    Made = Callable[[TrainJob], AbstractContextManager[tuple[PolicyRole, ReferenceRole | None]]]

#: two ranks sum gradients in another order than one, in float32; Adam divides by what may be small
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@pytest.fixture(scope="module")
def own_ray(folder: Path) -> Iterator[None]:
    with ray_session(folder / "ray", None, 2):
        yield


@contextlib.contextmanager
def here(job: TrainJob) -> Iterator[Any]:
    with (
        reproducible(job.train.seed, job.threads),
        models_here(dataclasses.replace(job, mesh=MeshSpec()), torch.device("cpu"), print) as models,
    ):
        yield models


@contextlib.contextmanager
def on_actors(job: TrainJob) -> Iterator[Any]:
    from posttrain_lib.adapters.verl_roles import VerlWorkers, verl_models

    with verl_models(VerlWorkers(job, {"CPU": 1}, job.world, private=True)) as models:
        yield models


KINDS = [pytest.param("here"), pytest.param("actors", marks=pytest.mark.slow)]


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Made:
    """Makes policy and reference as ``request.param`` says."""
    if request.param == "here":
        return here
    request.getfixturevalue("own_ray")
    return on_actors


def job_in(folder: Path, work: str, **train: Any) -> TrainJob:
    return policy_job(folder, work, mesh=MeshSpec(shard=2), reference=True, **train)


def kept(policy: PolicyRole) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy.weights()}


@dataclass
class Seen:
    """What a policy said and did over two updates, and what came back of its checkpoint."""

    logprobs: list[list[np.ndarray]]
    of_reference: list[np.ndarray]
    reports: list[StepReport]
    weights: dict[str, torch.Tensor]


def watched(made: Made, job: TrainJob) -> Seen:
    """Two updates, a checkpoint, and the same again from there, which the asserts compare bit for bit."""
    batches = [random_samples(seed, reference=True) for seed in range(2)]
    with made(job) as (policy, reference):
        assert reference is not None and policy.version == 0 and policy.resume() is None
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
    with made(job) as (policy, _):
        assert policy.resume() == ({"batch": 2}, reports[-1]) and policy.version == 2
        again = kept(policy)
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
        for left, right in zip(policy.logprobs(batches[0]), logprobs[-1], strict=True):
            np.testing.assert_array_equal(left, right)
    return Seen(logprobs, of_reference, reports, weights)


def test_a_policy_of_one_process(folder: Path) -> None:
    seen = watched(here, job_in(folder, "alone"))
    for sample, found in zip(random_samples(0, reference=True), seen.logprobs[0], strict=True):
        assert found.dtype == np.float32 and found.shape == (int(sample.trained.sum()),)
    for left, right in zip(seen.of_reference, seen.logprobs[0], strict=True):
        np.testing.assert_array_equal(left, right)  # the same model
    assert not np.array_equal(np.concatenate(seen.logprobs[0]), np.concatenate(seen.logprobs[1]))
    assert not np.allclose(np.concatenate(seen.logprobs[0]), np.concatenate(seen.logprobs[2]), atol=1e-3)


@pytest.mark.slow
def test_two_actors_learn_as_one_process(folder: Path, own_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain_lib.adapters.verl_roles._CHUNK_BYTES", 1500)  # less than a tensor, and no multiple
    alone, both = watched(here, job_in(folder, "one")), watched(on_actors, job_in(folder, "two"))
    for left, right in zip([*alone.logprobs, alone.of_reference], [*both.logprobs, both.of_reference], strict=True):
        np.testing.assert_allclose(np.concatenate(left), np.concatenate(right), **NEAR)
    for one, two in zip(alone.reports, both.reports, strict=True):
        assert (one.step, one.real_tokens, one.trained_weight) == (two.step, two.real_tokens, two.trained_weight)
        assert (one.loss, one.grad_norm) == pytest.approx((two.loss, two.grad_norm), rel=1e-5)
        assert one.figures == pytest.approx(two.figures, rel=1e-4, abs=1e-6)
    for name, value in alone.weights.items():
        torch.testing.assert_close(both.weights[name], value, **NEAR)


@pytest.mark.parametrize("made", KINDS, indirect=True)
def test_a_sample_that_does_not_fit_is_named(made: Made, folder: Path, request: pytest.FixtureRequest) -> None:
    long = random_samples(0, groups=1, group_size=1, reference=True)[0]
    many = np.arange(40, dtype=np.int32)
    long = dataclasses.replace(
        long, token_ids=many, trained=many > 38, signals={n: v[:1] for n, v in long.signals.items()}
    )
    job = job_in(folder, request.node.name)
    with made(job) as (policy, _), pytest.raises(DataError, match="does not fit into a packed row"):
        policy.update([long])


class FailsOnRankOne(PolicyLoss):
    """A loss that one rank cannot compute."""

    def __call__(self, model: Any, batch: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("one rank's own trouble")
        return super().__call__(model, batch)


@pytest.mark.slow
def test_what_one_rank_raises_is_told_with_its_rank(
    folder: Path, own_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    loss = "tests.contracts.test_policy_role:FailsOnRankOne"
    job = job_in(folder, "fails", loss=loss, loss_options={})
    with on_actors(job) as (policy, _), pytest.raises(TrainingError, match="worker 1 failed: RuntimeError") as caught:
        policy.update(random_samples(0))
    assert "one rank's own trouble" in str(caught.value) and caught.value.where.startswith("rank 1")
    assert "--- rank 1 failed" in capfd.readouterr().err


def test_a_lost_actor_is_said_and_none_is_left(folder: Path, own_ray: None) -> None:
    with on_actors(job_in(folder, "lost")) as (policy, _):
        assert len(actors()) == 2
        os.kill(actors()[1], signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="died"):
            policy.logprobs(random_samples(0))
    wait_for(lambda: not actors(), 30, "the other actor to end")
