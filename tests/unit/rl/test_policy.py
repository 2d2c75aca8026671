"""The policy's rank by itself: what it scores at, and losses that it does not take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_lib.errors import ConfigError
from posttrain_lib.rl.ranks import models_here
from posttrain_lib.schema.rollouts import Sampling
from posttrain_lib.training.job import TrainJob
from tests.support.policy_jobs import policy_job, random_samples

VERL = "posttrain_lib.adapters.verl_algorithms:VerlPolicyLoss"


def sampled_at(temperature: float, job: TrainJob) -> TrainJob:
    assert job.rollouts is not None
    settings = dataclasses.replace(job.rollouts.settings, sampling=Sampling(8, temperature))
    return dataclasses.replace(job, rollouts=dataclasses.replace(job.rollouts, settings=settings))


def test_samples_are_scored_at_the_temperature_of_sampling(tmp_path: Path) -> None:
    job = sampled_at(0.7, policy_job(tmp_path, loss_options={"temperature": 0.7}, reference=False))
    samples = random_samples(0)
    with models_here(job, torch.device("cpu"), print) as (policy, _):
        found, expected, other = policy.logprobs(samples), *(policy.logprobs(samples, temperature=t) for t in (0.7, 1))
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))
    assert not np.allclose(np.concatenate(found), np.concatenate(other), atol=1e-3)


@pytest.mark.parametrize(("loss", "options"), [("policy", {"temperature": 0.5}), (VERL, {})])
def test_a_loss_of_another_temperature_is_refused(loss: str, options: dict[str, float], tmp_path: Path) -> None:
    """Its own default is one: a loss named in the run file is not told what the engine samples at."""
    job = sampled_at(0.7, policy_job(tmp_path, loss=loss, loss_options=options))
    with (
        pytest.raises(ConfigError, match="another temperature") as caught,
        models_here(job, torch.device("cpu"), print),
    ):
        pass
    assert caught.value.where == "train.loss_options.temperature"
