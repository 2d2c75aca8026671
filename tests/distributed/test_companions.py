"""Recipes with a frozen model, and reward models, in the Trainer over two ranks: as on one process.

The student runs inside of the teacher's forward, so with sharded weights two roots of FSDP2 are open at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from posttrain_lib.config.model import Lora
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.evaluation.frozen import store_top_logprobs
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.losses.beside import Beside
from posttrain_lib.losses.distill import DistillLoss
from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.companion import Companion
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.device import reproducible
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import Trainer
from tests.distributed.test_mesh_training import HEADS, assert_same_weights, label, run_on
from tests.distributed.test_two_ranks import assert_near, figures, run_rank
from tests.oracles.tiny_job import make_job, tiny_config, write_model
from tests.support.pair_jobs import PADDING, live, pair_config, pair_job
from tests.support.rank_pool import RankPool

TEACHER = {**HEADS, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "tie_word_embeddings": False}
#: of the meshes, the one that cuts documents is for live teachers alone
CONTEXT = MeshSpec(context=2)
MESHES = [MeshSpec(shard=2), MeshSpec(tensor=2), pytest.param(MeshSpec(replicate=2), marks=pytest.mark.slow)]


def assert_like_one_process(alone: TrainJob, pool: RankPool, mesh: MeshSpec, **changes: Any) -> list[StepReport]:
    """Losses, figures, counts and weights of three steps; the reports of the first rank."""
    expected = run_rank(alone)
    folder = Path(alone.work_dir).parent
    ranks = run_on(pool, dataclasses.replace(alone, work_dir=str(folder / "ranks"), **changes), mesh)
    assert_near(ranks[0], expected)
    for other in ranks[1:]:
        assert [figures(report) for report in other] == [figures(report) for report in ranks[0]]
    for found, one in zip(ranks[0], expected, strict=True):
        assert found.figures == pytest.approx(one.figures, rel=1e-4, abs=1e-5)  # differences of sums of tens
        assert found.held_out_figures == pytest.approx(one.held_out_figures, rel=1e-4, abs=1e-5)
        assert found.hardware_flops == pytest.approx(one.hardware_flops, rel=1e-12)  # summed in another order
    assert_same_weights(folder / "alone", folder / "ranks")
    return ranks[0]


def distill_job(folder: Path, kept: str = "live", **changes: Any) -> TrainJob:
    options = {"divergence": "forward" if kept == "stored" else "symmetric", "hard_weight": 0.2}
    config = tiny_config(steps=3, loss="distill", loss_options=options, **{"micro_batch_rows": 1, **changes})
    job = make_job(folder, config, "alone", architecture=HEADS)
    write_model(folder / "teacher", seed=1, **TEACHER)
    if kept == "live":
        return dataclasses.replace(job, companion=live(folder, "teacher"))
    tables, teacher = (
        {split: folder / f"said-{split}" for split in ("train", "held_out")},
        load_model(folder / "teacher"),
    )
    for split, table in tables.items():
        store_top_logprobs(teacher, TokenStore(folder / split), table, {"model": "t"}, row_tokens=64, top_k=8)
    named = {split: str(table) for split, table in tables.items()}
    return dataclasses.replace(job, companion=Companion("stored", tables=named, made_of={"model": "t"}))


@pytest.mark.parametrize("kept", ["live", "stored"])
@pytest.mark.parametrize("mesh", MESHES, ids=label)
def test_distillation_is_that_of_one_process(kept: str, mesh: MeshSpec, rank_pool: RankPool, tmp_path: Path) -> None:
    reports = assert_like_one_process(distill_job(tmp_path, kept), rank_pool, mesh)
    assert (reports[-1].hardware_flops > reports[-1].model_flops) == (kept == "live")


def test_a_live_teacher_of_documents_that_lie_over_two_ranks(rank_pool: RankPool, tmp_path: Path) -> None:
    assert_like_one_process(distill_job(tmp_path), rank_pool, CONTEXT)


def test_blocks_that_run_again_inside_of_a_teachers_forward(rank_pool: RankPool, tmp_path: Path) -> None:
    job = distill_job(tmp_path, activation_checkpointing="full", clip_norm=0.1)
    assert_like_one_process(job, rank_pool, MeshSpec(shard=2))


def test_both_models_in_host_memory(rank_pool: RankPool, tmp_path: Path) -> None:
    assert_like_one_process(distill_job(tmp_path), rank_pool, MeshSpec(shard=2), offload="parameters")


@pytest.mark.parametrize("mesh", MESHES, ids=label)
def test_a_live_reference_is_that_of_one_process(mesh: MeshSpec, rank_pool: RankPool, tmp_path: Path) -> None:
    job = pair_job(tmp_path, pair_config(steps=3, loss_options={"beta": 1.0}), "alone", architecture=HEADS)
    write_model(tmp_path / "reference", seed=5, **HEADS)
    assert_like_one_process(dataclasses.replace(job, companion=live(tmp_path, "reference")), rank_pool, mesh)


@pytest.mark.parametrize("mesh", MESHES, ids=label)
def test_a_reward_model_is_that_of_one_process(mesh: MeshSpec, rank_pool: RankPool, tmp_path: Path) -> None:
    job = pair_job(tmp_path, pair_config("reward", steps=3), "alone", architecture=HEADS, score_padding=PADDING)
    assert_like_one_process(job, rank_pool, mesh)


@pytest.mark.parametrize("loss", ["dpo", "reward"])
@pytest.mark.parametrize("mesh", MESHES[:2], ids=label)
def test_adapters_with_the_base_underneath_or_a_score_on_top(
    loss: str, mesh: MeshSpec, rank_pool: RankPool, tmp_path: Path
) -> None:
    lora = Lora(rank=4, alpha=8.0, targets=("attention", "mlp"), seed=3)
    extra = {"companion": Companion("base")} if loss == "dpo" else {"score_padding": PADDING}
    job = pair_job(tmp_path, pair_config(loss, steps=3), "alone", architecture=HEADS, lora=lora, **extra)
    assert_like_one_process(job, rank_pool, mesh)


def stopped_on_rank(rank: int, job: TrainJob, rendezvous: str, stop_after: int) -> list[StepReport]:
    return run_rank(dataclasses.replace(job, rank=rank, rendezvous=rendezvous), stop_after)


def test_one_process_saves_and_two_go_on_with_the_same_stream(rank_pool: RankPool, tmp_path: Path) -> None:
    """And back: DPO beside a live reference, three steps of five on one process."""
    config = pair_config(steps=5, loss_options={"beta": 1.0}, checkpoint={"every_steps": 1, "keep_last": 2})
    job = pair_job(tmp_path, config, "whole", architecture=HEADS)
    write_model(tmp_path / "reference", seed=5, **HEADS)
    job = dataclasses.replace(job, companion=live(tmp_path, "reference"))
    whole = run_rank(job)
    cut = dataclasses.replace(job, work_dir=str(tmp_path / "cut"))
    run_rank(cut, stop_after=2)
    two = dataclasses.replace(cut, mesh=MeshSpec(shard=2))
    middle, _ = rank_pool.each(2, stopped_on_rank, two, f"127.0.0.1:{free_port()}", 4)
    last = run_rank(cut)
    assert [part[0].event.startswith("resumed") for part in (middle, last)] == [True, True]
    found = [*middle[1:], *last[1:]]
    assert_near(found, whole[3:])
    assert [report.source_units for report in found] == [report.source_units for report in whole[3:]]


def whole_weights(rank: int, job: TrainJob, rendezvous: str) -> dict[str, list[str]]:
    """Of each model, the weights that are whole on this rank after an evaluation and a step."""
    from posttrain_lib.parallel.process_group import process_group

    device = torch.device("cpu")
    job = dataclasses.replace(job, rank=rank, rendezvous=rendezvous)
    with reproducible(job.train.seed, 1), process_group(rank, job.world, rendezvous, device):
        trainer = Trainer(job, device)
        steps = trainer.run()
        next(steps), next(steps)
        assert isinstance(trainer.loss, DistillLoss) and isinstance(trainer.loss._attached, Beside)
        teacher = trainer.loss._attached.model
        assert isinstance(teacher, FSDPModule) and not any(weight.requires_grad for weight in teacher.parameters())
        models = {"student": trainer.state.model, "teacher": teacher}
        found = {
            name: [key for key, weight in model.named_parameters() if not isinstance(weight, DTensor)]
            for name, model in models.items()
        }
        trainer.loader.close()
        trainer.checkpoints.close()
        return found


def test_no_weight_stays_whole_between_steps(rank_pool: RankPool, tmp_path: Path) -> None:
    """A teacher's root has no backward after which it would be cut again; its head would lie whole on every rank."""
    job = dataclasses.replace(distill_job(tmp_path), mesh=MeshSpec(shard=2))
    for found in rank_pool.each(2, whole_weights, job, f"127.0.0.1:{free_port()}"):
        assert found == {"student": [], "teacher": []}
