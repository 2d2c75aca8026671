"""Distillation in the trainer: live and stored teachers agree, and the loss is the dense one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.data.collate import to_torch
from posttrain_lib.data.signal_table import SignalTable
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import ConfigError
from posttrain_lib.evaluation.frozen import store_top_logprobs
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.distill import DistillLoss
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.parallel.context import cut_batch
from posttrain_lib.schema.companion import Companion
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import VOCABULARY, make_job, pack_rows, tiny_config, write_model, write_store

#: rounding of a few hundred float64 operations
EXACT = 1e-10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_store(tmp_path / "train", 40, seed=1)
    write_model(tmp_path / "student")
    write_model(tmp_path / "teacher", seed=1, hidden_size=24, intermediate_size=48)
    return tmp_path


def trained(folder: Path) -> Decoder:
    return load_model(folder).double().requires_grad_(True)


def value_and_gradients(loss: DistillLoss, model: Decoder, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = loss(model, batch)
    output.local_sum.backward()
    return float(output.local_sum.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def dense(loss: DistillLoss, model: Decoder, teacher: Decoder, batch: Any) -> torch.Tensor:
    """The same of whole logits, by the formulas in the docstrings."""
    arguments = (batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen)
    index, heat = batch.supervised_index, loss.temperature
    logits = model(*arguments)[index, :VOCABULARY]
    log_q = (logits / heat).log_softmax(-1)
    log_p = (teacher(*arguments)[index, :VOCABULARY] / heat).log_softmax(-1).detach()
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    soft = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[loss.divergence]
    hard = -logits.log_softmax(-1).gather(1, batch.target_ids[index, None]).squeeze(1)
    values = (1 - loss.hard_weight) * heat**2 * soft + loss.hard_weight * hard
    return (values * batch.loss_weights[index]).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "reverse", "temperature": 2.0},
        {"divergence": "symmetric", "hard_weight": 0.3},
        {"temperature": 0.5, "hard_weight": 0.5},
    ],
)
def test_the_loss_is_the_dense_one(folder: Path, options: dict[str, Any]) -> None:
    student, teacher = trained(folder / "student"), load_model(folder / "teacher").double()
    batch = to_torch(pack_rows(TokenStore(folder / "train"), [[3, 1], [7], [0, 5, 2]], 64))
    loss = DistillLoss(**options)
    loss.attach(Beside(model=teacher))
    value, gradients = value_and_gradients(loss, student, batch)
    student.zero_grad()
    expected = dense(loss, student, teacher, batch)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=EXACT)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=EXACT)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_is_the_student_gives_nothing(folder: Path) -> None:
    student = trained(folder / "student")
    batch = to_torch(pack_rows(TokenStore(folder / "train"), [[3, 1], [7]], 64))
    for divergence in ("forward", "reverse", "symmetric", "jensen_shannon"):
        loss = DistillLoss(divergence=divergence)
        loss.attach(Beside(model=load_model(folder / "student").double()))
        value, gradients = value_and_gradients(loss, student, batch)
        assert abs(value) < EXACT
        assert all(float(gradient.abs().max()) < EXACT for gradient in gradients.values())


def test_nothing_to_train_gives_a_zero_that_belongs_to_the_graph(folder: Path) -> None:
    student = trained(folder / "student")
    loss = DistillLoss(hard_weight=0.5)
    loss.attach(Beside(model=load_model(folder / "teacher").double()))
    batch = pack_rows(TokenStore(folder / "train"), [[3]], 64)
    empty = dataclasses.replace(
        batch, loss_weights=np.zeros_like(batch.loss_weights), supervised_index=batch.supervised_index[:0]
    )
    value, gradients = value_and_gradients(loss, student, to_torch(empty))
    assert (loss.divisor(empty), value) == (0.0, 0.0)
    assert all(not gradient.any() for gradient in gradients.values())


def test_padded_vocabularies_of_two_sizes_are_compared_on_what_both_have(folder: Path) -> None:
    """Families pad one tokenizer's vocabulary to sizes of their own."""
    write_model(folder / "wide", seed=1, vocab_size=VOCABULARY + 16)
    student, wide = trained(folder / "student"), load_model(folder / "wide").double()
    batch = to_torch(pack_rows(TokenStore(folder / "train"), [[3, 1], [7]], 64))
    loss = DistillLoss()
    loss.attach(Beside(model=wide))
    value, _ = value_and_gradients(loss, student, batch)
    assert value == pytest.approx(float(dense(loss, student, wide, batch)), rel=EXACT)


@pytest.mark.parametrize("more", [(16, 0), (0, 16)], ids=["the student has more entries", "the teacher has more"])
def test_a_stored_teacher_is_compared_on_the_same_entries_as_a_live_one(folder: Path, more: tuple[int, int]) -> None:
    """What one of them has besides is left out of both, and not taken for a part of the rest."""
    folders = []
    for seed, besides in enumerate(more):
        folders.append(folder / f"model-{seed}")
        write_model(folders[-1], seed=seed, vocab_size=VOCABULARY + besides)
    student, teacher = trained(folders[0]), load_model(folders[1]).double()
    store = TokenStore(folder / "train")
    store_top_logprobs(
        teacher, store, folder / "signals", {"model": "t"}, row_tokens=64, top_k=VOCABULARY,
        vocab_size=student.config.vocab_size,
    )  # fmt: skip
    arrays, found = pack_rows(store, [[3, 1], [7]], 64), []
    for beside in (Beside(model=teacher), Beside(tables={"train": SignalTable(folder / "signals", store)})):
        loss = DistillLoss(hard_weight=0.25)
        loss.attach(beside)
        batch = to_torch(dataclasses.replace(arrays, signals=loss.signals(arrays, "train")))
        found.append(value_and_gradients(loss, student, batch))
    (live, of_live), (stored, of_stored) = found
    assert stored == pytest.approx(live, rel=1e-3)  # float16 keeps 1 part in 2048 of a log-probability
    for name, gradient in of_live.items():
        torch.testing.assert_close(of_stored[name], gradient, rtol=0, atol=1e-3 * float(gradient.abs().max()))


def run(job: Any) -> list[Any]:
    return list(train(job))


def test_a_teacher_that_is_stored_whole_trains_as_the_live_one(folder: Path) -> None:
    config = tiny_config(steps=4, loss="distill", loss_options={"temperature": 2.0, "hard_weight": 0.25})
    write_model(folder / "model")
    write_store(folder / "held_out", 30, seed=2)
    teacher, tables = load_model(folder / "teacher"), {}
    for split in ("train", "held_out"):
        tables[split] = str(folder / f"signals-{split}")
        store_top_logprobs(
            teacher, TokenStore(folder / split), Path(tables[split]), {"model": "t"},
            row_tokens=64, top_k=VOCABULARY, temperature=2.0,
        )  # fmt: skip
    live = make_job(folder, config, "live", companion=Companion("live", folder=str(folder / "teacher")))
    kept = make_job(folder, config, "kept", companion=Companion("stored", tables=tables, made_of={"model": "t"}))
    for one, other in zip(run(live), run(kept), strict=True):
        # log-probabilities are kept in float16: 1 part in 2048
        if one.loss is not None:
            assert one.loss == pytest.approx(other.loss, rel=1e-3)
            assert one.figures.keys() == other.figures.keys() == {"distill/divergence", "distill/cross_entropy"}
            total = 0.75 * 4 * one.figures["distill/divergence"] + 0.25 * one.figures["distill/cross_entropy"]
            assert one.loss == pytest.approx(total, rel=1e-5)  # sums in float32
        if one.held_out:
            assert one.held_out["all"] == pytest.approx(other.held_out["all"], rel=1e-3)
            assert one.held_out_figures.keys() == one.figures.keys() or one.step == 0


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    write_model(folder / "model")
    write_store(folder / "held_out", 30, seed=2)
    job = make_job(folder, tiny_config(steps=2, loss="distill"))
    with pytest.raises(ConfigError, match="the run names none"):
        run(job)
    tables = {split: folder / f"signals-{split}" for split in ("train", "held_out")}
    for split, table in tables.items():
        store = TokenStore(folder / split)
        store_top_logprobs(load_model(folder / "teacher"), store, table, {"model": "t"}, row_tokens=64, top_k=4)
    companion = Companion("stored", tables={split: str(table) for split, table in tables.items()})
    warm = tiny_config(steps=2, loss="distill", loss_options={"temperature": 2.0})
    with pytest.raises(ConfigError, match="stored log-probs do not fit"):
        run(dataclasses.replace(job, train=warm, companion=companion))


@pytest.mark.parametrize("kept", ["live", "stored"])
def test_a_run_goes_on_bit_for_bit(folder: Path, kept: str) -> None:
    write_model(folder / "model")
    write_store(folder / "held_out", 30, seed=2)
    companion = Companion("live", folder=str(folder / "teacher"))
    if kept == "stored":
        tables = {split: folder / f"signals-{split}" for split in ("train", "held_out")}
        for split, table in tables.items():
            store_top_logprobs(
                load_model(folder / "teacher"), TokenStore(folder / split), table, {}, row_tokens=64, top_k=5
            )
        companion = Companion("stored", tables={split: str(table) for split, table in tables.items()})
    config = tiny_config(steps=4, loss="distill", loss_options={"hard_weight": 0.25})
    whole = run(make_job(folder, config, "whole", companion=companion))
    steps = train(make_job(folder, config, "cut", companion=companion))
    while next(steps).step < 2:
        pass
    steps.close()
    resumed = run(make_job(folder, config, "cut", companion=companion))
    assert resumed[0].event.startswith("resumed") and resumed[0].step == 2
    told = [[(r.loss, r.grad_norm, r.figures, r.held_out) for r in reports] for reports in (resumed[1:], whole[3:])]
    assert told[0] == told[1]
    one, other = (load_model_state(folder / f"{work}/checkpoints/step-00000004") for work in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(other[name], value) for name, value in one.items())


def test_stored_tokens_of_documents_over_several_ranks_are_refused(folder: Path) -> None:
    store = TokenStore(folder / "train")
    store_top_logprobs(load_model(folder / "teacher"), store, folder / "said", {}, row_tokens=64, top_k=5)
    loss = DistillLoss()
    loss.attach(Beside(tables={"train": SignalTable(folder / "said", store)}))
    with pytest.raises(ConfigError, match="lie over several ranks"):
        loss.signals(cut_batch(pack_rows(store, [[3, 1]], 64), 2, 0), "train")
