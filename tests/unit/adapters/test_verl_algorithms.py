"""verl's advantages and losses by name: its own values, and a refusal of what means something else here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from verl.trainer.ppo import core_algos as core

from posttrain_lib.adapters.verl_algorithms import VerlPolicyLoss
from posttrain_lib.errors import ConfigError
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.contract import check_loss
from posttrain_lib.losses.policy import ADVANTAGES, OLD, PolicyLoss
from posttrain_lib.rl.advantages import RULES, advantages_of
from posttrain_lib.rl.ranks import models_here
from tests.support.policy_jobs import policy_job, random_samples

LOSS = "posttrain_lib.adapters.verl_algorithms:VerlPolicyLoss"
REWARDS = np.array([0.0, 1.0, 1.0, 0.3, -2.0, 0.5, 0.25, 0.25, 0.25])
GROUPS = np.array([4, 4, 4, 1, 1, 1, 9, 9, 9])
TOKENS = np.array([3, 7, 1, 2, 2, 5, 4, 1, 6])


@pytest.mark.parametrize("name", sorted(RULES.keys() & core.ADV_ESTIMATOR_REGISTRY.keys()))
def test_an_advantage_that_both_have_is_one(name: str) -> None:
    # verl sums in float32 in places
    expected = advantages_of(name, REWARDS, GROUPS, TOKENS)
    np.testing.assert_allclose(advantages_of(f"verl:{name}", REWARDS, GROUPS, TOKENS), expected, rtol=1e-5, atol=1e-6)


def test_advantages_that_only_verl_has() -> None:
    # pass@k: the best of a group has what it is better by than the second, over the deviation
    found = advantages_of("verl:grpo_passk", np.array([0.0, 3.0, 1.0]), np.zeros(3, np.int64), np.array([2, 3, 1]))
    np.testing.assert_allclose(found, [0, 2 / np.std([0, 3, 1], ddof=1), 0], rtol=1e-5)
    # optimal baseline: rewards less their mean, weighed by lengths
    found = advantages_of("verl:opo", np.array([0.0, 3.0]), np.zeros(2, np.int64), np.array([2, 4]))
    np.testing.assert_allclose(found, [-2, 1], rtol=1e-6)


@pytest.mark.parametrize(("name", "needs"), [("gae", "gamma, lam, values"), ("remax", "reward_baselines")])
def test_an_advantage_of_more_than_outcomes_is_refused(name: str, needs: str) -> None:
    with pytest.raises(ConfigError, match=needs):
        advantages_of(f"verl:{name}", REWARDS, GROUPS, TOKENS)


def test_an_advantage_that_is_unknown_or_cannot_is_named() -> None:
    with pytest.raises(ConfigError, match="grpo_passk"):
        advantages_of("verl:grpo_pass", REWARDS, GROUPS, TOKENS)
    with pytest.raises(ConfigError, match="at least 2 samples"):
        advantages_of("verl:grpo_passk", np.ones(1), np.zeros(1, np.int64), np.ones(1, np.int64))


def tokens(count: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(count, generator=generator, dtype=torch.float64) * 3
    moved = torch.randn(count, generator=generator, dtype=torch.float64) * 0.4
    return {
        OLD: old,
        "logprobs": (old + moved).requires_grad_(),
        ADVANTAGES: torch.randn(count, generator=generator, dtype=torch.float64),
    }


NAMED: list[tuple[str, dict[str, Any]]] = [
    ("vanilla", {}),
    ("vanilla", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}),
    ("cispo", {"clip_ratio_high": 0.3}),
    ("gpg", {}),
    ("dro", {"policy_loss": {"dro_beta": 0.2}}),
    ("dppo_tv", {}),
    ("dppo_kl", {}),
]


@pytest.mark.parametrize(("name", "options"), NAMED, ids=str)
def test_value_and_gradient_are_verls(name: str, options: dict[str, Any]) -> None:
    found = tokens()
    loss = build_loss(LOSS, {"name": name, "options": options})
    assert isinstance(loss, VerlPolicyLoss)
    segments = torch.zeros(len(found[OLD]), dtype=torch.int64)
    values, _ = loss.of_tokens(found["logprobs"], found[OLD], found, segments, 1)
    mean, _ = core.get_policy_loss_fn(name)(
        old_log_prob=found[OLD][None],
        log_prob=found["logprobs"][None],
        advantages=found[ADVANTAGES][None],
        response_mask=torch.ones_like(found[OLD])[None],
        loss_agg_mode="token-mean",
        config=loss._config,
    )
    ours, theirs = values.sum() / len(values), mean
    gradients = [torch.autograd.grad(each, found["logprobs"])[0] for each in (ours, theirs)]
    # float64 sums in another order
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert bool(gradients[0].any())


@pytest.mark.parametrize("name", ["gspo", "sapo", "geo_mean", "clip_cov", "kl_cov"])
def test_a_loss_of_more_than_tokens_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="none of which depends on others") as caught:
        build_loss(LOSS, {"name": name})
    assert caught.value.got == name


def test_vanilla_is_our_clip() -> None:
    found = tokens()
    segments = torch.zeros(len(found[OLD]), dtype=torch.int64)
    ours, theirs = (
        loss.of_tokens(found["logprobs"], found[OLD], found, segments, 1)[0]
        for loss in (PolicyLoss(dual_clip=3.0), VerlPolicyLoss())
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


class Sampled(VerlPolicyLoss):
    """With signals that depend on nothing but the token's document and place in it; made of documents."""

    kind = "document"

    def signals(self, batch: Any, split: str) -> dict[str, Any]:
        index = batch.supervised_index
        segments = np.searchsorted(batch.cu_seqlens, index, side="right") - 1
        documents, places = batch.document_ids[segments].astype(float), batch.positions[index].astype(float)
        made = {ADVANTAGES: np.cos(documents * 1.7) + 0.1, OLD: -3.8 + 0.3 * np.sin(documents + places)}
        return super().signals(dataclasses.replace(batch, signals=made), split)


@pytest.mark.parametrize(("name", "options"), [("vanilla", {}), ("cispo", {"clip_ratio_high": 0.3})], ids=str)
def test_the_laws_of_every_loss(name: str, options: dict[str, Any]) -> None:
    check_loss(Sampled(name, options))


def test_a_policy_learns_by_it(tmp_path: Path) -> None:
    norms = []
    for loss, options in (("policy", {"dual_clip": 3.0}), (LOSS, {"name": "vanilla"})):
        job = policy_job(tmp_path, f"work-{len(norms)}", loss=loss, loss_options=options)
        with models_here(job, torch.device("cpu"), print) as (policy, _):
            reports = [policy.update(random_samples(seed)) for seed in range(2)]
        assert "mismatch/kl" in reports[-1].figures
        norms.append([report.grad_norm for report in reports])
    # the value differs: our first update is told as -A log pi, of the same gradient; float32 in another order
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "unread"),
    [
        ("vanilla", {"clip_ratio_low": 0.1, "loss_agg_mode": "seq-mean-token-mean"}, "loss_agg_mode"),
        ("vanilla", {"use_kl_loss": True, "kl_loss_coef": 0.5}, "kl_loss_coef, use_kl_loss"),
        ("gpg", {"clip_ratio_low": 0.1}, "clip_ratio_low"),
        ("vanilla", {"policy_loss": {"dro_beta": 0.2}}, "policy_loss.dro_beta"),
    ],
)
def test_an_option_that_the_loss_does_not_read_is_refused(name: str, options: dict[str, Any], unread: str) -> None:
    with pytest.raises(ConfigError, match="reads") as caught:
        build_loss(LOSS, {"name": name, "options": options})
    assert caught.value.got == unread


def test_options_are_named() -> None:
    with pytest.raises(ConfigError, match="vanilla"):
        build_loss(LOSS, {"name": "ppo"})
    with pytest.raises(ConfigError, match="dro_beta"):
        build_loss(LOSS, {"name": "dro"})
    with pytest.raises(ConfigError, match="clip_rato"):
        build_loss(LOSS, {"options": {"clip_rato": 0.1}})
