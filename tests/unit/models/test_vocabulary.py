"""A padded vocabulary leaves no trace: not in logits, losses, samples, trained weights, or files."""

from __future__ import annotations

import dataclasses
import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.checkpoint.hf import iter_hf_weights, load_hf_weights, save_hf_folder
from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.data.loader import LoadedStep
from posttrain_lib.errors import CheckpointError, DataError, ModelError
from posttrain_lib.evaluation.generation import greedy_generate, token_logprobs
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.spec import VOCABULARY_WEIGHTS
from posttrain_lib.models.vocabulary import padded, with_padded_vocabulary
from posttrain_lib.ops.head_divergence import linear_divergence
from posttrain_lib.ops.head_topk import top_logprobs
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.checks import check_ids
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import Trainer, train
from tests.oracles.tiny_job import VOCABULARY, make_job, tiny_config
from tests.support.tiny_models import CASES, write_tiny_model

TOKENS, MULTIPLE = 96, 64  # the tiny models' vocabulary is no multiple, and goes to 128
#: a product of another width may sum in another order: float32 rounding of logits of order 1
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(case: str) -> Path:
        path = root / case.replace(" ", "")
        return path if path.is_dir() else write_tiny_model(case, path)

    return folder


@given(st.integers(1, 300_000), st.sampled_from([1, 2, 8, 64, 128, 256]))
def test_the_padded_size_is_the_next_multiple(size: int, multiple: int) -> None:
    rows = padded(size, multiple)
    assert rows % multiple == 0 and size <= rows < size + multiple


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be padded"):
        padded(96, 0)


def test_nothing_to_pad_changes_nothing(tiny: Callable[[str], Path]) -> None:
    spec = spec_from_folder(tiny("qwen3"))
    assert with_padded_vocabulary(spec, 1) == with_padded_vocabulary(spec, 32) == spec
    assert with_padded_vocabulary(with_padded_vocabulary(spec, 64), 1) == spec


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_family_computes_the_same_and_stores_the_same(
    case: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny(case)
    plain, wide = load_model(folder), load_model(folder, pad_vocabulary_to=MULTIPLE)
    assert wide.head_weight.shape[0] == wide.embed_tokens.weight.shape[0] == 128
    for name in VOCABULARY_WEIGHTS:
        if (weight := dict(wide.named_parameters()).get(name)) is not None:
            assert not weight[TOKENS:].any()
    documents = torch.randint(TOKENS, (40,)), torch.cat([torch.arange(25), torch.arange(15)])
    layout = torch.tensor([0, 25, 40], dtype=torch.int32), 25
    ours, theirs = wide(*documents, *layout), plain(*documents, *layout)
    torch.testing.assert_close(ours[:, :TOKENS], theirs, **NEAR)
    assert (ours[:, TOKENS:] == -torch.inf).all()

    spec = spec_from_folder(folder)
    for name, model, its in (
        ("plain", plain, spec),
        ("wide", wide, with_padded_vocabulary(spec, MULTIPLE)),
    ):
        save_hf_folder(dict(model.named_parameters()), its, folder, tmp_path / name, "float32")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "wide" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize("case", ["qwen3", "granite"])  # untied; tied with a logit scale
def test_padding_has_probability_0_wherever_the_head_is_used(case: str, tiny: Callable[[str], Path]) -> None:
    plain, wide = load_model(tiny(case)), load_model(tiny(case), pad_vocabulary_to=MULTIPLE)
    sequences = [torch.randint(TOKENS, (length,)).tolist() for length in (20, 7)]
    for ours, theirs in zip(token_logprobs(wide, sequences), token_logprobs(plain, sequences), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert greedy_generate(wide, sequences, 8, ()) == greedy_generate(plain, sequences, 8, ())

    hidden, index = torch.randn(9, wide.config.hidden_size), torch.arange(9)
    weights = torch.ones(9)
    kept, ids = top_logprobs(hidden, wide.output_head, index, TOKENS)
    torch.testing.assert_close(kept.exp().sum(1), torch.ones(9), **NEAR)
    assert int(ids.max()) < TOKENS
    # A teacher with less padding than the student: what is compared is the vocabulary that both have.
    apart = hidden + 0.3 * torch.randn_like(hidden)
    for teacher in (plain.output_head, wide.output_head):
        measured = linear_divergence(hidden, wide.output_head, apart, teacher, weights, index, divergence="forward")
        expected = linear_divergence(
            hidden, plain.output_head, apart, plain.output_head, weights, index, divergence="forward"
        )
        for mine, other in zip(measured, expected, strict=True):
            torch.testing.assert_close(mine, other, **NEAR)


def test_loading_zeroes_what_was_there(tiny: Callable[[str], Path]) -> None:
    spec = with_padded_vocabulary(spec_from_folder(tiny("qwen3")), MULTIPLE)
    model = Decoder(spec.config)
    torch.nn.init.ones_(model.embed_tokens.weight)
    load_hf_weights(model, spec, tiny("qwen3"))
    assert not model.embed_tokens.weight[TOKENS:].any()
    for name, tensor in iter_hf_weights(spec, tiny("qwen3")):
        assert torch.equal(tensor, model.get_parameter(name)), name


@pytest.mark.parametrize("tied", [True, False])
def test_training_leaves_padding_zero_and_learns_the_same(tied: bool, tmp_path: Path) -> None:
    config = tiny_config()  # AdamW with weight decay
    architecture = {"tie_word_embeddings": tied}
    reports = {}
    for multiple in (1, 48):
        trainer = Trainer(
            make_job(tmp_path, config, f"to-{multiple}", architecture, pad_vocabulary_to=multiple), torch.device("cpu")
        )
        try:
            reports[multiple] = list(trainer.run())
        finally:
            trainer.loader.close()
    model, optimizer = trainer.state.model, trainer.state.optimizer
    padding = [p for name, p in model.named_parameters() if name in VOCABULARY_WEIGHTS]
    assert len(padding) == (1 if tied else 2)
    for parameter in padding:
        assert parameter.shape[0] == 96
        state = optimizer.state[parameter]
        for rows in (parameter.data, state["exp_avg"], state["exp_avg_sq"]):
            assert rows[:VOCABULARY].any() and not rows[VOCABULARY:].any()
    for ours, theirs in zip(reports[48], reports[1], strict=True):
        assert ours.loss == (theirs.loss and pytest.approx(theirs.loss, rel=1e-4))
        assert ours.held_out == (theirs.held_out and pytest.approx(theirs.held_out, rel=1e-4))


def test_a_checkpoint_of_another_padding_is_refused_and_of_the_same_goes_on(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(), pad_vocabulary_to=48)
    whole = list(train(dataclasses.replace(job, work_dir=str(tmp_path / "whole"))))
    for report in train(job):
        if report.step == 4:
            break
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        list(train(dataclasses.replace(job, pad_vocabulary_to=128)))
    assert "embed_tokens.weight" in str(caught.value.got), caught.value.got
    assert "96" in str(caught.value.got) and "128" in str(caught.value.expected)
    resumed = list(train(job))
    assert [report.loss for report in resumed[1:]] == [report.loss for report in whole[5:]]


def test_ids_between_the_vocabulary_and_its_padding_are_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(), architecture={"vocab_size": 63}, pad_vocabulary_to=64)
    with pytest.raises(DataError, match="does not know") as caught:
        list(train(job))
    assert "63" in str(caught.value)


def test_a_live_step_with_such_ids_is_refused(tiny: Callable[[str], Path]) -> None:
    spec = with_padded_vocabulary(spec_from_folder(tiny("qwen3")), MULTIPLE)

    def step(largest: int) -> LoadedStep:
        ids = np.array([0, largest], np.int32)
        batch = PackedBatch(
            ids, ids, np.ones(2, np.float32), np.arange(2, dtype=np.int32), np.array([0, 2], np.int32),
            np.arange(2), np.zeros(1, np.int32), np.zeros(1, np.int64), max_seqlen=2, real_tokens=2,
        )  # fmt: skip
        return LoadedStep(7, [batch], 2.0, 2, 2, 0.0)

    check_ids(spec, step(TOKENS - 1))
    with pytest.raises(DataError, match="does not know") as caught:
        check_ids(spec, step(TOKENS))
    assert caught.value.where == "step 7"


def run_rank(job: TrainJob) -> list[StepReport]:
    return list(train(job))


@pytest.mark.slow
def test_a_rank_that_holds_padding_and_more_alone(tmp_path: Path) -> None:
    # 192 rows over two ranks: the first holds tokens and padding, the second nothing but padding
    job = make_job(tmp_path, tiny_config(steps=2), "two", {"tie_word_embeddings": False}, pad_vocabulary_to=192)
    alone = list(train(dataclasses.replace(job, work_dir=str(tmp_path / "one"))))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{probe.getsockname()[1]}"
    jobs = [dataclasses.replace(job, rank=rank, mesh=MeshSpec(shard=2), rendezvous=rendezvous) for rank in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        together = pool.map_async(run_rank, jobs, chunksize=1).get(timeout=240)
    for reports in together:
        assert [report.loss for report in reports[1:]] == pytest.approx([r.loss for r in alone[1:]], rel=1e-5)
    state = load_model_state(Path(job.checkpoint_folder) / "step-00000002")
    for name in VOCABULARY_WEIGHTS:
        assert state[name].shape[0] == 192 and not state[name][VOCABULARY:].any()
