"""The one loop over transformers' own classes: it learns, resumes bit for bit, and says what it cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import CheckpointError, ConfigError
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.evaluation.perplexity import held_out_loss
from posttrain_lib.losses import build_loss
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training.build import spec_of
from posttrain_lib.training.flops import batch_flops, relative_pair_cost
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, pack_rows, tiny_config, write_store
from tests.support.hf_models import write_hf_model
from tests.support.tiny_models import write_tiny_model


def run(job: TrainJob, stop_after: int | None = None) -> tuple[list[StepReport], TrainResult | None]:
    events, reports = train(job), []
    while True:
        try:
            reports.append(next(events))
        except StopIteration as end:
            return reports, end.value
        if reports[-1].step == stop_after:
            events.close()
            return reports, None


@pytest.fixture
def job_of(tmp_path: Path) -> Callable[..., TrainJob]:
    """(model_type, config, changes of the job) -> the job, on a model of that type."""
    write_store(tmp_path / "train", 60, seed=1, longest=16)
    write_store(tmp_path / "held_out", 8, seed=2, longest=16)

    def job(model_type: str, work: str = "work", **changes: object) -> TrainJob:
        if not (tmp_path / "model").exists():
            write_hf_model(model_type, tmp_path / "model")
        config = tiny_config(**{"rows_per_step": 4, "steps": 6, **changes})
        return make_job(tmp_path, config, work=work, backend="hf")

    return job


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "cohere"])
def test_it_learns(job_of: Callable[..., TrainJob], model_type: str) -> None:
    job = job_of(model_type, steps=10, optimizer={"lr": 3e-2}, evaluate_every_steps=10)
    reports, result = run(job)
    assert reports[-1].held_out["all"] < 0.95 * reports[0].held_out["all"]
    assert reports[-1].model_flops > 0
    state = load_model_state(result.last_checkpoint)
    before = load_model(job.model_folder, backend="hf")
    assert set(state) == set(before.state_dict())
    assert not any(torch.equal(state[name], value) for name, value in before.named_parameters())
    before.load_state_dict(state)
    again = held_out_loss(before, build_loss("sft"), TokenStore(Path(job.held_out_store)), row_tokens=64).losses
    assert again == pytest.approx(reports[-1].held_out, rel=1e-6)  # other rows: float32 rounding


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"activation_checkpointing": "full"}])
def test_resumed_is_uninterrupted_bit_for_bit(job_of: Callable[..., TrainJob], changes: dict) -> None:
    whole, result = run(job_of("gpt2", "whole", **changes))
    run(job_of("gpt2", "cut", **changes), stop_after=5)
    resumed, second = run(job_of("gpt2", "cut", **changes))
    assert [report.step for report in resumed] == [4, 5, 6]
    assert [(r.loss, r.grad_norm) for r in resumed] == [(r.loss, r.grad_norm) for r in whole[4:]]
    one, other = load_model_state(result.last_checkpoint), load_model_state(second.last_checkpoint)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_recomputation_changes_nothing(job_of: Callable[..., TrainJob]) -> None:
    plain, _ = run(job_of("gpt_neox", "plain", steps=2))
    again, _ = run(job_of("gpt_neox", "again", steps=2, activation_checkpointing="selective"))
    assert [(r.loss, r.grad_norm) for r in again] == [(r.loss, r.grad_norm) for r in plain]


def test_micro_batches_change_nothing(job_of: Callable[..., TrainJob]) -> None:
    one, _ = run(job_of("stablelm", "one", steps=2, micro_batch_rows=1))
    all_, _ = run(job_of("stablelm", "all", steps=2, micro_batch_rows=4))
    # Gradients are added up in another order: float32 rounding.
    assert [r.loss for r in one[1:]] == pytest.approx([r.loss for r in all_[1:]], rel=1e-5)


def test_a_known_family_trains_alike_under_both_backends(job_of: Callable[..., TrainJob], tmp_path: Path) -> None:
    # transformers gives the embedding of a padding token no gradient, and the data has all tokens
    write_tiny_model("qwen3", tmp_path / "model", pad_token_id=None)
    hf, _ = run(job_of("qwen3", "hf", steps=3))
    native, _ = run(dataclasses.replace(job_of("qwen3", "native", steps=3), backend="native"))
    # The same mathematics twice, three steps of AdamW apart; the losses are compared with rounding grown by them.
    assert [r.loss for r in hf[1:]] == pytest.approx([r.loss for r in native[1:]], rel=1e-4)
    assert [r.grad_norm for r in hf[1:]] == pytest.approx([r.grad_norm for r in native[1:]], rel=1e-3)
    with pytest.raises(CheckpointError, match="backend differs"):
        run(job_of("qwen3", "native", steps=3))


def test_flops_are_counted_as_of_plain_attention(job_of: Callable[..., TrainJob]) -> None:
    job = job_of("gpt2")
    spec = spec_of(job)
    batch = pack_rows(TokenStore(Path(job.train_store)), [[0, 1], [2]], 32)
    lengths = np.diff(batch.cu_seqlens)[batch.document_ids >= 0].astype(float)
    products = spec.body_parameters * lengths.sum() + spec.head_parameters * len(batch.supervised_index)
    pairs = 12 * 32 * 2 * (lengths**2 / 2).sum()  # hidden size x layers
    assert batch_flops(spec, batch) == 6 * products + pairs
    assert relative_pair_cost(spec) == 12 * 32 * 2 / (6 * (spec.body_parameters + spec.head_parameters))


def test_more_workers_are_refused(job_of: Callable[..., TrainJob]) -> None:
    with pytest.raises(ConfigError, match="one worker"):
        spec_of(dataclasses.replace(job_of("gpt2"), mesh=MeshSpec(shard=2)))
