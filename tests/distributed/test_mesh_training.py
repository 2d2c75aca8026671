"""The Trainer on any mesh: the same three steps, held-out losses and checkpoints as on one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.config.model import Lora
from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from tests.distributed.test_two_ranks import assert_near, figures, run_rank
from tests.oracles.tiny_job import make_job, tiny_config
from tests.support.rank_pool import RankPool

#: two key heads, so that two ranks can share them
HEADS = {"num_key_value_heads": 2}
MESHES = [
    MeshSpec(replicate=2),
    MeshSpec(tensor=2),
    MeshSpec(shard=2, tensor=2),
    pytest.param(MeshSpec(replicate=2, shard=2), marks=pytest.mark.slow),
    pytest.param(MeshSpec(replicate=2, tensor=2), marks=pytest.mark.slow),
]


def label(value: Any) -> str:
    return "-".join(f"{name}{degree}" for name, degree in vars(value).items() if degree > 1)


def on_rank(rank: int, job: TrainJob, rendezvous: str) -> list[StepReport]:
    return run_rank(dataclasses.replace(job, rank=rank, rendezvous=rendezvous))


def run_on(pool: RankPool, job: TrainJob, mesh: MeshSpec) -> list[list[StepReport]]:
    job = dataclasses.replace(job, mesh=mesh)
    return pool.each(mesh.world, on_rank, job, f"127.0.0.1:{free_port()}")


def assert_same_weights(one: Path, other: Path) -> None:
    weights, found = (load_model_state(path / "checkpoints/step-00000003") for path in (one, other))
    assert list(found) == list(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)  # Adam divides by small moments


@pytest.mark.parametrize("mesh", MESHES, ids=label)
def test_three_steps_are_those_of_one_process(mesh: MeshSpec, rank_pool: RankPool, tmp_path: Path) -> None:
    # clip far below the norm, so that a wrong total norm would show; an untied head
    config = tiny_config(steps=3, clip_norm=0.1, micro_batch_rows=1)
    architecture = {**HEADS, "tie_word_embeddings": False}
    alone = run_rank(make_job(tmp_path, config, work="alone", architecture=architecture))
    ranks = run_on(rank_pool, make_job(tmp_path, config, work="ranks"), mesh)
    assert_near(ranks[0], alone)
    for other in ranks[1:]:
        assert [figures(report) for report in other] == [figures(report) for report in ranks[0]]
    assert_same_weights(tmp_path / "alone", tmp_path / "ranks")


@pytest.mark.parametrize("mesh", [MeshSpec(shard=2, tensor=2)], ids=label)
def test_adapters_too(mesh: MeshSpec, rank_pool: RankPool, tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=8.0, targets=("attention", "mlp"), dora=True, seed=3)
    config = tiny_config(steps=3)
    alone = run_rank(make_job(tmp_path, config, work="alone", lora=lora, architecture=HEADS))
    ranks = run_on(rank_pool, make_job(tmp_path, config, work="ranks", lora=lora), mesh)
    assert_near(ranks[0], alone)
    assert_same_weights(tmp_path / "alone", tmp_path / "ranks")


@pytest.mark.parametrize("mesh", [MeshSpec(shard=2), MeshSpec(tensor=2)], ids=label)
def test_weights_in_host_memory_give_the_same_bits(mesh: MeshSpec, rank_pool: RankPool, tmp_path: Path) -> None:
    config = tiny_config(steps=3, clip_norm=0.1)
    plain, _ = run_on(rank_pool, make_job(tmp_path, config, work="plain", architecture=HEADS), mesh)
    moved, _ = run_on(rank_pool, make_job(tmp_path, config, work="moved", offload="parameters"), mesh)
    assert [figures(report) for report in moved] == [figures(report) for report in plain]
    one, other = (load_model_state(tmp_path / f"{work}/checkpoints/step-00000003") for work in ("plain", "moved"))
    assert all(torch.equal(other[name], weight) for name, weight in one.items())


def test_tensor_ranks_in_bfloat16(rank_pool: RankPool, tmp_path: Path) -> None:
    config = tiny_config(steps=3, precision="bf16")
    alone = run_rank(make_job(tmp_path, config, work="alone", architecture=HEADS))
    ranks = run_on(rank_pool, make_job(tmp_path, config, work="ranks"), MeshSpec(tensor=2))
    for found, expected in zip(ranks[0][1:], alone[1:], strict=True):
        # a product's halves are rounded before they are added: 2^-9 of each, averaged over many tokens
        assert found.loss == pytest.approx(expected.loss, rel=5e-3)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=5e-2)
