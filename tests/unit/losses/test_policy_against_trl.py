"""Policy gradients: TRL's values and gradients on the same tokens, and on a batch that its own trainer sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.hf import load_hf_weights, stored_tensors
from posttrain_lib.losses.contract import outcome_of
from posttrain_lib.losses.policy import ADVANTAGES, OLD, REFERENCE, ROLLOUT, PolicyLoss
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.rl.advantages import advantages_of
from posttrain_lib.rl.packing import pack_samples
from posttrain_lib.schema.rollouts import TrainSample
from tests.oracles.tiny_job import write_model
from tests.oracles.trl_policy import loss_of_trl, make_trainer
from tests.unit.losses.test_policy import LENGTHS, ours, tokens

#: float64 sums in another order
NEAR = {"rtol": 1e-9, "atol": 1e-12}
HORIZON = 9
CLIP = {"clip_low": 0.15, "clip_high": 0.28}
TRL_CLIP = {"epsilon_low": 0.15, "epsilon_high": 0.28}
#: (our options, TRL's)
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"aggregate": "sequence", **CLIP}, {"loss_type": "grpo", **TRL_CLIP}),
    "bnpo": ({**CLIP}, {"loss_type": "bnpo", **TRL_CLIP}),
    "dapo": ({**CLIP}, {"loss_type": "dapo", **TRL_CLIP}),
    "dr_grpo": (
        {"aggregate": "constant", "horizon": HORIZON, **CLIP},
        {"loss_type": "dr_grpo", "max_completion_length": HORIZON, **TRL_CLIP},
    ),
    "two sides": ({**CLIP, "dual_clip": 1.5}, {"loss_type": "dapo", **TRL_CLIP, "delta": 1.5}),
    "cispo": (
        {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3},
        {"loss_type": "cispo", "epsilon_high": 1.3},
    ),
    "gspo": (
        {"ratio": "sequence", "aggregate": "sequence", "clip_low": 0.05, "clip_high": 0.08},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
    ),
    "gspo of tokens": (
        {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.08},
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08},
    ),
}


def padded(found: dict[str, torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """[B, R], zero behind each completion."""
    rows = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.float64)
    return rows.index_put((found["segments"], torch.cat([torch.arange(length) for length in LENGTHS])), values)


def both(
    loss: PolicyLoss, theirs: dict[str, Any], found: dict[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(value, gradient) by our loss, and by TRL's with these options."""
    signals = {"old_per_token_logps": padded(found, found[OLD]), "ref_per_token_logps": padded(found, found[REFERENCE])}
    if loss.correction is not None:
        signals["importance_sampling_ratio"] = padded(found, (found[OLD] - found[ROLLOUT]).exp().clamp(max=2.0))
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    mask = padded(found, torch.ones_like(found[OLD]))
    logprobs = padded(found, found["logprobs"])
    of_trl = loss_of_trl(logprobs, mask, found[ADVANTAGES][ends], signals, **theirs, beta=loss.kl_weight)
    own, other = [(value, *torch.autograd.grad(value, found["logprobs"])) for value in (ours(loss, found), of_trl)]
    return own, other


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", list(LOSSES))
def test_values_and_gradients_are_trls(name: str, beta: float, corrected: bool) -> None:
    found = tokens()
    options, theirs = LOSSES[name]
    loss = PolicyLoss(**options, kl_weight=beta, correction="truncate" if corrected else None)
    (value, gradient), (trl_value, trl_gradient) = both(loss, theirs, found)
    assert bool(gradient.any())
    if corrected and loss.ratio == "sequence":  # TRL's gradient gives each token its completion's mean correction
        gradient, trl_gradient = (by_completion(found, each) for each in (gradient, trl_gradient))
    torch.testing.assert_close(value, trl_value, **NEAR)
    torch.testing.assert_close(gradient, trl_gradient, **NEAR)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", [name for name, (options, _) in LOSSES.items() if "ratio" not in options])
def test_a_kl_weighted_by_the_ratio_is_trls(name: str, first: bool) -> None:
    found = tokens()
    if first:  # every ratio is 1, and has a gradient all the same
        found[OLD] = found["logprobs"].detach().clone()
    options, theirs = LOSSES[name]
    loss = PolicyLoss(**options, kl_weight=0.3, kl_unbiased=True)
    (value, gradient), (trl_value, trl_gradient) = both(loss, {**theirs, "use_bias_correction_kl": True}, found)
    torch.testing.assert_close(value, trl_value, **NEAR)
    torch.testing.assert_close(gradient, trl_gradient, **NEAR)
    plain = ours(PolicyLoss(**options, kl_weight=0.3), found)
    assert not torch.allclose(torch.autograd.grad(plain, found["logprobs"])[0], gradient)


def by_completion(found: dict[str, torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(LENGTHS), dtype=torch.float64).index_add(0, found["segments"], values)


GROUP, TEMPERATURE = 3, 0.7
REWARDS = (0.0, 1.0, 0.25, -1.0, 0.5, 0.5, 2.0, 2.0, 2.0)
PROMPTS = ("w3 w4 w5 w6", "w9", "w33 w44")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("trl") / "model", 3)


@pytest.fixture(scope="module")
def trainer(model_folder: Path) -> Any:
    options = {"temperature": TEMPERATURE, "beta": 0.2, "use_bias_correction_kl": False}
    return make_trainer(model_folder.parent / "out", model_folder, REWARDS, group=GROUP, completion=6, **options)


def sampled(trainer: Any) -> dict[str, torch.Tensor]:
    """A batch with everything that a second update compares with, float32 numbers in float64."""
    rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(GROUP)]
    inputs = trainer._generate_and_score_completions(rows)
    generator = torch.Generator().manual_seed(1)
    shape = inputs["completion_ids"].shape
    for name, centre in (("old_per_token_logps", -3.5), ("ref_per_token_logps", -3.8)):
        inputs[name] = (centre + torch.randn(shape, generator=generator)).double()
    inputs["advantages"] = inputs["advantages"].float().double()
    return inputs


def samples_of(inputs: dict[str, torch.Tensor]) -> list[TrainSample]:
    samples = []
    for number in range(len(inputs["advantages"])):
        (prompt, completion), kept = (
            [inputs[f"{part}_ids"][number][inputs[f"{part}_mask"][number].bool()] for part in ("prompt", "completion")],
            inputs["completion_mask"][number].bool(),
        )
        ids = torch.cat([prompt, completion]).numpy().astype(np.int32)
        signals = {
            ADVANTAGES: np.full(len(completion), inputs["advantages"][number].item(), np.float32),
            OLD: inputs["old_per_token_logps"][number][kept].numpy().astype(np.float32),
            REFERENCE: inputs["ref_per_token_logps"][number][kept].numpy().astype(np.float32),
        }
        trained = np.arange(len(ids)) >= len(prompt)
        samples.append(TrainSample(ids, trained, len(prompt), number // GROUP, number % GROUP, signals))
    return samples


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("grpo", {"aggregate": "sequence"}),
        ("dapo", {"entropy_bonus": 0.05}),
        ("dr_grpo", {"aggregate": "constant", "horizon": 6}),
    ],
)
def test_a_batch_of_its_trainer_has_its_loss_and_gradients(
    trainer: Any, model_folder: Path, loss_type: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bonus = options.get("entropy_bonus", 0.0)
    for name, value in (("loss_type", loss_type), ("entropy_coef", bonus), ("_entropy_bonus_enabled", bonus > 0)):
        monkeypatch.setattr(trainer, name, value)
    inputs = sampled(trainer)
    trainer.model.zero_grad()
    wanted = trainer._compute_loss(trainer.model, inputs)
    wanted.backward()
    spec = spec_from_folder(model_folder)
    model = build_model(spec, dtype=torch.float64)
    load_hf_weights(model, spec, model_folder)
    # two rows: a prompt is shared within a row, and one of them begins in another
    packed = pack_samples(samples_of(inputs), row_tokens=40, micro_batch_rows=1)
    assert len(packed.micro_batches) == 2 and packed.tokens < packed.whole_tokens
    loss = PolicyLoss(**options, kl_weight=0.2, temperature=TEMPERATURE)
    found = outcome_of(loss, model, packed.micro_batches)
    # transformers' norms and rotary embeddings round to float32 (6e-8) in a float64 model too, and TRL's head does so
    # with log-probs of around 4
    assert found.loss == pytest.approx(wanted.item(), rel=1e-5)
    ours_by_name = stored_tensors(spec, dict(found.gradients), torch.float64)
    for name, parameter in trainer.model.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(ours_by_name[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize(("scale", "rule"), [("group", "grpo"), ("none", "dr_grpo")])
def test_advantages_are_trls(trainer: Any, scale: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "scale_rewards", scale)
    wanted = sampled(trainer)["advantages"].numpy()
    groups = np.repeat(np.arange(len(PROMPTS)), GROUP)
    found = advantages_of(rule, np.array(REWARDS), groups, np.ones(len(REWARDS), np.int64))
    if rule == "grpo":  # TRL adds 1e-4 to the deviation, we 1e-6
        spread = np.repeat(np.std(np.reshape(REWARDS, (-1, GROUP)), axis=1, ddof=1), GROUP)
        found = found * (spread + 1e-6) / (spread + 1e-4)
    # TRL's rewards are float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
