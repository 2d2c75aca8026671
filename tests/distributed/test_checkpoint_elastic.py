"""One training that changes its layout at every stop: the same tokens, losses within the noise of summation order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.mesh import SINGLE, MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, tiny_config
from tests.support.rank_pool import RankPool

STEPS = 8
#: float32 sums in another order (6e-8 each), grown through a few updates of Adam; two ranks differ from one by 2e-7
NEAR = {"rel": 1e-5, "abs": 1e-6}
SHARD_2, SHARD_4 = MeshSpec(shard=2), MeshSpec(shard=4)
TENSOR_2, BOTH = MeshSpec(tensor=2), MeshSpec(shard=2, tensor=2)
HYBRID = MeshSpec(replicate=2, shard=2)
#: two heads of keys, so that two tensor ranks have one each
ARCHITECTURE = {"num_key_value_heads": 2}


def run_rank(rank: int, job: TrainJob, stop_after: int) -> list[StepReport]:
    reports = []
    for report in train(dataclasses.replace(job, rank=rank)):
        reports.append(report)
        if report.step == stop_after:
            break
    return reports


@pytest.mark.parametrize(
    "layouts",
    [[SINGLE, SHARD_2, SHARD_4, SINGLE], [SHARD_2, TENSOR_2, BOTH, HYBRID]],
    ids=["1 -> 2 -> 4 -> 1", "shard -> tensor -> both -> hybrid"],
)
def test_a_layout_for_every_two_steps(rank_pool: RankPool, tmp_path: Path, layouts: list[MeshSpec]) -> None:
    config = tiny_config(steps=STEPS, evaluate_every_steps=4)
    whole = run_rank(0, make_job(tmp_path, config, work="whole", architecture=ARCHITECTURE), STEPS)
    reports = {}
    for number, mesh in enumerate(layouts):
        rendezvous = f"127.0.0.1:{free_port()}"
        job = make_job(tmp_path, config, work="moved", mesh=mesh, rendezvous=rendezvous)
        found = rank_pool.each(mesh.world, run_rank, job, 2 * number + 2)[0]
        assert [report.step for report in found] == [2 * number, 2 * number + 1, 2 * number + 2]
        assert found[0].event.startswith("resumed") == (number > 0)
        reports.update({report.step: report for report in found[number > 0 :]})
    for expected in whole:
        report = reports[expected.step]
        assert report.loss == (expected.loss if expected.loss is None else pytest.approx(expected.loss, **NEAR))
        assert (report.real_tokens, report.tokens_seen) == (expected.real_tokens, expected.tokens_seen)
        assert (report.source_tokens, report.source_units) == (expected.source_tokens, expected.source_units)
    one, other = (load_model_state(tmp_path / f"{work}/checkpoints/step-{STEPS:08d}") for work in ("whole", "moved"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)  # Adam divides by small moments
