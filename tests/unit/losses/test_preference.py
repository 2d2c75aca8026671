"""Losses on pairs: formulas by hand, references live, stored and without adapters, five steps beside the twin."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.data.signal_table import SignalTable, SignalWriter
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import ConfigError, DataError, ModelError
from posttrain_lib.losses import build_loss
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.contract import (
    Outcome,
    other_than,
    outcome_of,
    pack,
    tiny_decoder,
    write_examples,
)
from posttrain_lib.losses.dpo import DPOLoss
from posttrain_lib.losses.pair_objectives import OBJECTIVES, log_one_minus_exp, orpo
from posttrain_lib.losses.reward import RewardLoss
from posttrain_lib.losses.segments import pair_signals, trained_pairs
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import LoraSettings, apply_lora
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.mesh import SINGLE
from posttrain_lib.training.train_step import StepSettings, train_step
from tests.oracles import dpo_twin
from tests.oracles.tiny_job import write_model

#: float64 sums of at most some hundred terms
EXACT = {"rel": 1e-10, "abs": 1e-12}
ALL = [tuple(range(6))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_examples(tmp_path_factory.mktemp("pairs") / "store", "pair", seed=0)


def dense_logprobs(model: Decoder, store: TokenStore) -> torch.Tensor:
    """[examples]: summed log-probabilities of each document's trained tokens, through full logits, one by one."""
    sums = []
    for example in range(len(store)):
        ids, weights = store.get(example)
        tokens, count = torch.from_numpy(ids.copy()).long(), len(ids)
        logits = model(tokens, torch.arange(count), torch.tensor([0, count], dtype=torch.int32), count)
        picked = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
        sums.append(picked[torch.from_numpy(weights[1:] > 0)].sum())
    return torch.stack(sums).detach()


def test_conservative_dpo_is_mitchells_formula(store: TokenStore) -> None:
    model, beta, swapped = tiny_decoder(0), 0.2, 0.15
    reference = other_than(model)
    loss = DPOLoss(beta=beta, label_smoothing=swapped)
    loss.attach(Beside(reference))
    found = outcome_of(loss, model, pack(store, ALL, 1, share=True))
    ratios = dense_logprobs(model, store) - dense_logprobs(reference, store)
    chosen, rejected = ratios[0::2], ratios[1::2]
    rate = torch.sigmoid(beta * (chosen - rejected))
    expected = -((1 - swapped) * rate.log() + swapped * (1 - rate).log())
    assert found.loss == pytest.approx(expected.mean().item(), **EXACT)
    values = {
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margin": beta * (chosen - rejected).mean(),
        "rewards/accuracy": (chosen > rejected).double().mean(),
        "logps/chosen": dense_logprobs(model, store)[0::2].mean(),
        "logps/rejected": dense_logprobs(model, store)[1::2].mean(),
        "kl": ratios.mean(),
    }
    means = {name: (figure[0] / figure[1]).item() for name, figure in found.figures.items()}
    assert means == pytest.approx({name: value.item() for name, value in values.items()}, **EXACT)
    items = [found.items[2 * pair][0].item() for pair in range(6)]
    assert items == pytest.approx(expected.tolist(), **EXACT), "a pair's loss belongs to its chosen document"


#: what a pair costs while policy and reference agree: both log ratios are 0
AT_THE_START = {
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "ipo": 1 / (2 * 0.1) ** 2,
    "hinge": 1.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
}


@pytest.mark.parametrize("variant", OBJECTIVES)
def test_a_policy_that_is_its_reference(store: TokenStore, variant: str) -> None:
    model, loss = tiny_decoder(0), DPOLoss(variant)
    loss.attach(Beside(copy.deepcopy(model)))
    found = outcome_of(loss, model, pack(store, ALL, 1))
    assert found.loss == pytest.approx(AT_THE_START[variant], **EXACT)
    assert found.figures["rewards/margin"][0] == found.figures["kl"][0] == 0
    assert any(gradient.any() for gradient in found.gradients.values()), "it is where training starts"


@pytest.mark.parametrize("variant", OBJECTIVES)
def test_gradients_are_right(variant: str) -> None:
    ratios = torch.tensor([[0.3, -2.0, 5.0], [-0.4, 1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    smoothing = 0.2 if variant in ("sigmoid", "robust") else 0.0
    assert torch.autograd.gradcheck(lambda r: OBJECTIVES[variant](r[0], r[1], 0.7, smoothing), ratios)


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert found.loss == pytest.approx(expected.loss, **EXACT)
    assert found.figures.keys() == expected.figures.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_stored_reference_is_the_live_one(store: TokenStore, tmp_path: Path, name: str) -> None:
    model = tiny_decoder(0)
    reference = other_than(model)
    live, stored = build_loss(name), build_loss(name)
    live.attach(Beside(reference))
    writer = SignalWriter(tmp_path / "signals", store, "example", {"logprob": (np.float64, ())}, {"model": "digest"})
    for example, logprob in enumerate(dense_logprobs(reference, store).tolist()):
        writer.put(example, {"logprob": np.array(logprob)})
    writer.close()
    stored.attach(Beside(tables={"train": SignalTable(tmp_path / "signals", store)}))
    batches = pack(store, [(3, 1), (5, 0, 2, 4)], 1, share=True)
    assert_same(outcome_of(stored, model, batches), outcome_of(live, model, batches))
    with pytest.raises(ConfigError, match="not stored"):
        stored.signals(batches[0], "held_out")


def test_without_a_model_the_reference_is_the_base_under_the_adapters(store: TokenStore) -> None:
    base = tiny_decoder(0)
    model = apply_lora(copy.deepcopy(base), LoraSettings(rank=2, alpha=4.0, targets=("attention", "mlp", "head")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
    alone, beside = DPOLoss(), DPOLoss()
    alone.attach(Beside())
    beside.attach(Beside(base))
    batches = pack(store, ALL, 1)
    found = outcome_of(alone, model, batches)
    assert_same(found, outcome_of(beside, model, batches))
    assert found.figures["kl"][0] != 0
    assert set(found.gradients) == {name for name, _ in model.named_parameters() if "lora" in name}


def test_five_steps_have_the_losses_of_the_readable_twin(store: TokenStore, tmp_path: Path) -> None:
    beta, lr, clip_norm = 0.5, 0.3, 2.0
    for name, seed in (("policy", 0), ("reference", 1)):
        write_model(tmp_path / name, seed)
    spec = spec_from_folder(tmp_path / "policy")
    model, reference = (build_model(spec, dtype=torch.float64) for _ in range(2))
    load_hf_weights(model, spec, tmp_path / "policy")
    load_hf_weights(reference, spec, tmp_path / "reference")
    loss = DPOLoss(beta=beta)
    loss.attach(Beside(reference.requires_grad_(False)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    settings = StepSettings(rank_mesh(SINGLE, torch.device("cpu")), "fp32", clip_norm, 2, store.row_id)
    units = [(0, 1, 2), (3, 4, 5), (0, 2, 4), (1, 3, 5), (0, 1, 5)]
    ours = []
    for step, chosen in enumerate(units, start=1):
        batches = pack(store, [chosen[:2], chosen[2:]], 1, share=True)
        divisor = sum(loss.divisor(batch) for batch in batches)
        ours.append(train_step(model, loss, optimizer, batches, settings, global_divisor=divisor, step=step).loss)
    pairs = [[pair_of(store, unit) for unit in chosen] for chosen in units]
    theirs = dpo_twin.train(tmp_path / "policy", tmp_path / "reference", pairs, beta=beta, lr=lr, clip_norm=clip_norm)
    # Both are float64, but for rotary tables, norms' eps and clipping's 1e-6, which float32 rounds: 1e-7 of a logit.
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert max(theirs) - min(theirs) > 0.1, "steps that change nothing would prove little"


def pair_of(store: TokenStore, unit: int) -> dpo_twin.Pair:
    """Prompt, chosen and rejected ids."""
    (chosen, weights), (rejected, _) = store.get(2 * unit), store.get(2 * unit + 1)
    prompt = int((weights == 0).sum())
    return chosen[:prompt].tolist(), chosen[prompt:].tolist(), rejected[prompt:].tolist()


def test_a_pair_without_trained_tokens_counts_nowhere(store: TokenStore) -> None:
    (batch,) = pack(store, [(0, 1)], 1)
    first = slice(0, int(batch.cu_seqlens[2]))
    weights = batch.loss_weights.copy()
    weights[first] = 0
    masked = dataclasses.replace(batch, loss_weights=weights, supervised_index=np.flatnonzero(weights).astype(np.int32))
    assert DPOLoss().divisor(batch) == 2 and DPOLoss().divisor(masked) == 1
    assert {name: places.tolist() for name, places in trained_pairs(masked).items()} == {"chosen": [2], "rejected": [3]}
    assert RewardLoss().divisor(masked) == 2, "a score needs no trained token"


def test_half_a_pair_is_refused(store: TokenStore) -> None:
    (batch,) = pack(store, [(0, 1)], 1)
    with pytest.raises(DataError, match="whole pairs"):
        pair_signals(dataclasses.replace(batch, document_ids=np.where(batch.document_ids == 1, -1, batch.document_ids)))


def test_an_answer_of_probability_one_has_finite_odds() -> None:
    certain = torch.tensor([0.0, -1e-12, -0.5], dtype=torch.float64, requires_grad=True)
    losses = orpo(certain, torch.tensor([-1.0, 0.0, -800.0], dtype=torch.float64), 0.1)
    losses.sum().backward()
    assert losses.isfinite().all() and certain.grad.isfinite().all()
    logprobs = -torch.logspace(-5, 2, 50, dtype=torch.float64)
    # 1 - exp(-1e-5) loses five of float64's sixteen digits, which is what the function is there to avoid
    expected = torch.log(1 - torch.exp(logprobs))
    torch.testing.assert_close(log_one_minus_exp(logprobs), expected, rtol=1e-9, atol=1e-12)


def test_a_loss_with_a_reference_asks_for_it(store: TokenStore) -> None:
    with pytest.raises(ConfigError, match="compares with a reference and has none"):
        outcome_of(DPOLoss(), tiny_decoder(0), pack(store, ALL, 1))


def test_a_reward_needs_a_head_of_one_row(store: TokenStore) -> None:
    with pytest.raises(ModelError, match="head of one row"):
        outcome_of(RewardLoss(), tiny_decoder(0), pack(store, ALL, 1))


@pytest.mark.parametrize(
    ("name", "options", "where"),
    [
        ("dpo", {"variant": "sigmod"}, "variant"),
        ("dpo", {"beta": 0.0}, "beta"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("dpo", {"variant": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ("dpo", {"sft_weight": -1}, "sft_weight"),
        ("kto", {"baseline": -0.1}, "baseline"),
        ("kto", {"undesirable_weight": -0.1}, "undesirable_weight"),
        ("reward", {"centre": -0.1}, "centre"),
        ("reward", {"margin_weight": -1.0}, "margin_weight"),
        ("sft", {"label_smoothing": 1.0}, "label_smoothing"),
        ("sft", {"z_loss": -1.0}, "z_loss"),
        ("sft", {"entropy_bonus": -1.0}, "entropy_bonus"),
    ],
)
def test_options_outside_their_range_are_refused(name: str, options: dict, where: str) -> None:
    with pytest.raises(ConfigError, match=f"train.loss_options.{where}"):
        build_loss(name, options)


def test_a_batch_of_parts_of_documents_is_refused(store: TokenStore) -> None:
    (batch,) = pack(store, [(0, 1)], 1, share=True)
    assert batch.prefixes is not None
    part: PackedBatch = dataclasses.replace(batch, prefixes=dataclasses.replace(batch.prefixes, exchange=object()))
    with pytest.raises(ConfigError, match="lie over several ranks"):
        pair_signals(part)
