"""Policy gradients: verl's values and gradients on the same tokens, and the laws of every loss."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.data.collate import to_torch
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.contract import check_loss, outcome_of, pack, tiny_decoder, write_examples
from posttrain_lib.losses.policy import ADVANTAGES, OLD, REFERENCE, ROLLOUT, PolicyLoss, mismatch_figures
from posttrain_lib.losses.policy_objectives import KL

LENGTHS = (3, 1, 5, 4)
#: float64 sums in another order, and verl adds 1e-8 to a completion's number of tokens: terms of about 1 that cancel
VERL = {"rtol": 2e-8, "atol": 2e-8}
#: float64 sums in another order
NEAR = {"rtol": 1e-9, "atol": 1e-12}


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probabilities of a few completions' tokens, near and far from what they were, and one advantage each."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    old = -torch.rand(count, generator=generator, dtype=torch.float64) * 3
    segments = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    moved = torch.randn(count, generator=generator, dtype=torch.float64) * 0.4
    return {
        "segments": segments,
        OLD: old,
        "logprobs": (old + moved).requires_grad_(),
        ADVANTAGES: torch.tensor([1.3, -0.7, 0.4, -1.9], dtype=torch.float64)[segments],
        REFERENCE: old + 0.1 * torch.randn(count, generator=generator, dtype=torch.float64),
        ROLLOUT: old + 0.5 * torch.randn(count, generator=generator, dtype=torch.float64),
    }


def ours(loss: PolicyLoss, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of those tokens alone, as a step would divide it."""
    values, _ = loss.of_tokens(found["logprobs"], found[OLD], found, found["segments"], len(LENGTHS))
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    if loss.aggregate == "token":
        return values.sum() / len(values)
    if loss.aggregate == "sequence":
        return (values / lengths[found["segments"]]).sum() / len(LENGTHS)
    return values.sum() / (len(LENGTHS) * loss.horizon)


def of_verl(name: str, found: dict[str, torch.Tensor], mode: str, weights: bool = False, **config: Any) -> torch.Tensor:
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    def padded(values: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.float64)
        place = torch.cat([torch.arange(length) for length in LENGTHS])
        return rows.index_put((found["segments"], place), values)

    actor = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **config)
    loss, _ = core.get_policy_loss_fn(name)(
        old_log_prob=padded(found[OLD]),
        log_prob=padded(found["logprobs"]),
        advantages=padded(found[ADVANTAGES]),
        response_mask=padded(torch.ones_like(found[OLD])),
        loss_agg_mode=mode,
        config=actor,
        rollout_is_weights=padded((found[OLD] - found[ROLLOUT]).exp().clamp(max=2.0)) if weights else None,
    )
    return loss


MODES = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("aggregate", list(MODES))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vanilla", {"dual_clip": 3.0}),
        ("vanilla", {"clip_high": 0.28, "dual_clip": 1.1}),
        ("gspo", {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.08}),
        ("cispo", {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3}),
    ],
)
def test_values_and_gradients_are_verls(name: str, options: dict[str, Any], aggregate: str, corrected: bool) -> None:
    found = tokens()
    # the longest completion's length is what verl divides by if nothing is said
    horizon = {"horizon": max(LENGTHS)} if aggregate == "constant" else {}
    correction = {"correction": "truncate"} if corrected else {}
    loss = PolicyLoss(**options, aggregate=aggregate, **horizon, **correction)
    limits = {"clip_ratio_low": loss.clip.low, "clip_ratio_high": loss.clip.high, "clip_ratio_c": loss.clip.dual or 3.0}
    results = []
    for value in (ours(loss, found), of_verl(name, found, MODES[aggregate], corrected, **limits)):
        results.append((value, *torch.autograd.grad(value, found["logprobs"])))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, **VERL)
    assert bool(results[0][1].any())


def test_whatever_holds_a_token_back_counts_as_clipped() -> None:
    """Exactly the tokens whose own loss has no gradient: bounds of either side, and the bound of a bad one's ratio."""
    found = tokens()
    loss = PolicyLoss(dual_clip=1.1)
    values, figures = loss.of_tokens(found["logprobs"], found[OLD], found, found["segments"], len(LENGTHS))
    (gradient,) = torch.autograd.grad(values.sum(), found["logprobs"])
    dual = (found[ADVANTAGES] < 0) & ((found["logprobs"] - found[OLD]).exp() > 1.1)
    assert torch.equal(figures["policy/clip_share"], gradient == 0) and dual.any() and (gradient != 0).any()


@pytest.mark.parametrize("name", list(KL))
def test_the_distance_to_a_reference_is_verls(name: str) -> None:
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    found = tokens()
    left, right = (
        KL[name](found["logprobs"], found[REFERENCE]),
        core.kl_penalty_forward(found["logprobs"], found[REFERENCE], name),
    )
    torch.testing.assert_close(left, right, **NEAR)
    loss = PolicyLoss(kl=name, kl_weight=0.3)
    bare = ours(PolicyLoss(), found)
    torch.testing.assert_close(ours(loss, found), bare + 0.3 * right.mean(), **NEAR)


@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2])
def test_a_small_distance_is_told_in_float32(apart: float) -> None:
    """Half the squared difference, and never below 0: engine and trainer in float32 are no further apart."""
    generator = torch.Generator().manual_seed(0)
    sampler = -3 * torch.rand(10_000, generator=generator)
    trainer = sampler + apart * torch.randn(len(sampler), generator=generator)
    found = mismatch_figures(trainer, sampler)["mismatch/kl"]
    half_square = 0.5 * (trainer.double() - sampler.double()).square()
    assert (found >= 0).all()
    # the series' next term is a third of the difference times as large
    assert found.double().mean().item() == pytest.approx(half_square.mean().item(), rel=0.02)


def test_what_a_reference_would_never_say_is_pulled_back() -> None:
    """However far: the gradient of k3 is 1 less the ratio of reference to policy, and that is nothing here."""
    logprobs = torch.tensor([-0.1, -0.1, -60.0], requires_grad=True)
    found = KL["k3"](logprobs, torch.tensor([-25.1, -90.1, -0.1]))
    torch.testing.assert_close(found[:2].detach(), torch.tensor([24.0, 89.0]))
    (gradient,) = torch.autograd.grad(found.sum(), logprobs)
    torch.testing.assert_close(gradient[:2], torch.ones(2))
    assert found.isfinite().all() and gradient.isfinite().all()


def test_the_largest_log_ratio_is_told_as_it_is() -> None:
    figures = mismatch_figures(torch.tensor([-0.5, -50.0]), torch.tensor([-0.75, -0.5]))
    assert figures["mismatch/log_ratio_max"].tolist() == [0.25, 49.5]


def test_what_disagrees_with_the_sampler_is_masked() -> None:
    found = tokens()
    found[ROLLOUT] = found[OLD].clone()
    found[ROLLOUT][2] -= math.log(2.5)
    bare, _ = PolicyLoss().of_tokens(found["logprobs"], found[OLD], found, found["segments"], len(LENGTHS))
    loss = PolicyLoss(correction="mask", correction_most=2.0)
    values, figures = loss.of_tokens(found["logprobs"], found[OLD], found, found["segments"], len(LENGTHS))
    assert values[2] == 0 and torch.equal(values[3:], bare[3:]) and torch.equal(values[:2], bare[:2])
    assert figures["mismatch/ratio"][2].item() == pytest.approx(2.5)


class Sampled(PolicyLoss):
    """With signals that depend on nothing but the token's document and place in it."""

    def signals(self, batch: Any, split: str) -> dict[str, Any]:
        index = batch.supervised_index
        segments = np.searchsorted(batch.cu_seqlens, index, side="right") - 1
        documents, places = batch.document_ids[segments].astype(float), batch.positions[index].astype(float)
        made = {
            ADVANTAGES: np.cos(documents * 1.7) + 0.1,
            OLD: -3.8 + 0.3 * np.sin(documents + places),
            REFERENCE: -3.9 + 0.2 * np.cos(documents * places),
            ROLLOUT: -3.8 + 0.3 * np.sin(documents + places + 0.5),
        }
        return super().signals(dataclasses.replace(batch, signals=made), split)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregate": "sequence", "kl_weight": 0.1, "entropy_bonus": 0.01},
        {"aggregate": "constant", "horizon": 50, "objective": "cispo", "correction": "truncate"},
        {"ratio": "sequence", "aggregate": "sequence", "correction": "mask"},
        {"objective": "reinforce"},
    ],
    ids=str,
)
def test_the_laws_of_every_loss(options: dict[str, Any]) -> None:
    check_loss(Sampled(**options))


class FirstUpdate(Sampled):
    """Nothing is known of the policy that sampled: it is this one."""

    def signals(self, batch: Any, split: str) -> dict[str, Any]:
        return {ADVANTAGES: super().signals(batch, split)[ADVANTAGES]}


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_a_first_update_in_three_products_is_that_in_four(aggregate: Any, tmp_path: Path) -> None:
    check_loss(FirstUpdate(aggregate=aggregate))
    model, store = tiny_decoder(0), write_examples(tmp_path / "store", "document", 0)
    batches = pack(store, [(0, 1, 2, 3)], 1)
    quick = outcome_of(FirstUpdate(aggregate=aggregate), model, batches)
    # an entropy that weighs nothing makes the loss look at log-probabilities
    slow = outcome_of(FirstUpdate(aggregate=aggregate, entropy_bonus=1e-300), model, batches)
    for name, gradient in slow.gradients.items():
        # the weight of a token, advantage included, is one float32 number to the head
        torch.testing.assert_close(quick.gradients[name], gradient, rtol=1e-6, atol=1e-7 * float(gradient.abs().max()))
    assert quick.figures["policy/ratio"].tolist() == slow.figures["policy/ratio"].tolist()


def test_what_a_batch_lacks_is_said(tmp_path: Path) -> None:
    store = write_examples(tmp_path / "store", "document", 0)
    (batch,) = pack(store, [(0, 1)], 1)
    with pytest.raises(DataError, match="advantages"):
        PolicyLoss().signals(batch, "train")
    short = dataclasses.replace(batch, signals={ADVANTAGES: np.zeros(3)})
    with pytest.raises(DataError, match="one number a trained token"):
        PolicyLoss().signals(short, "train")
    full = dataclasses.replace(batch, signals={ADVANTAGES: np.zeros(len(batch.supervised_index))})
    with pytest.raises(DataError, match="reference_logprobs"):
        PolicyLoss(kl_weight=0.1).signals(full, "train")
    assert (
        to_torch(dataclasses.replace(full, signals=PolicyLoss().signals(full, "train"))).signals[ADVANTAGES].any() == 0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "ppo"},
        {"aggregate": "constant"},
        {"horizon": 10},
        {"dual_clip": 0.5},
        {"correction": "clip"},
        {"correction_most": 0.5, "correction": "mask"},
        {"kl": "k4"},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train\.loss_options"):
        build_loss("policy", options)
