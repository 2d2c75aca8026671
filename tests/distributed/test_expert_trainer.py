"""A whole run of the trainer with experts dealt out over ranks, against one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, tiny_config
from tests.support.rank_pool import RankPool

#: float32 sums in another order, grown through a few updates of Adam, as in test_two_ranks
NEAR = {"rel": 1e-5, "abs": 1e-6}
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def run_job(rank: int, job: TrainJob) -> list[StepReport]:
    return list(train(dataclasses.replace(job, rank=rank)))


def test_the_trainer_over_experts_trains_as_one_process(rank_pool: RankPool, tmp_path: Path) -> None:
    """Gradient norm and clipping over two meshes, optimiser, checkpoint."""
    config = tiny_config(steps=3, clip_norm=0.1, checkpoint={"every_steps": 3, "keep_last": 1})
    single = list(train(make_job(tmp_path, config, work="alone", architecture=MOE)))
    job = make_job(
        tmp_path, config, work="two", mesh=MeshSpec(shard=2, expert=2), rendezvous=f"127.0.0.1:{free_port()}"
    )
    over_ranks, _ = rank_pool.each(2, run_job, job)
    assert len(over_ranks) == len(single) == 4
    for found, wanted in zip(over_ranks, single, strict=True):
        for name in ("loss", "grad_norm", "held_out"):
            value = getattr(wanted, name)
            assert getattr(found, name) == (value if value is None else pytest.approx(value, **NEAR)), name
    one = load_model_state(tmp_path / "alone/checkpoints/step-00000003")
    other = load_model_state(tmp_path / "two/checkpoints/step-00000003")
    assert {name: value.shape for name, value in other.items()} == {name: value.shape for name, value in one.items()}
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)  # Adam divides by small moments
