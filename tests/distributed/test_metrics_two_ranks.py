"""Figures of a step on two ranks: the same work whatever the mesh, memory by share, time blocked in collectives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, tiny_config
from tests.support.rank_pool import RankPool

STEPS = 3


def trained(rank: int, folder: Path, mesh: MeshSpec, rendezvous: str) -> list[StepReport]:
    config = tiny_config(steps=STEPS, micro_batch_rows=1, profile={"steps": [2]})
    heads = {"num_key_value_heads": 2}  # tensor ranks take whole ones
    job = make_job(folder, config, work="-".join(map(str, vars(mesh).values())), architecture=heads)
    return list(train(replace(job, mesh=mesh, rank=rank, rendezvous=rendezvous)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[StepReport]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, trained(0, folder, MeshSpec(), "")


@pytest.mark.parametrize("axis", ["shard", "replicate", "tensor", "context"])
def test_the_mesh_changes_no_count(axis: str, alone: tuple[Path, list[StepReport]], rank_pool: RankPool) -> None:
    folder, single = alone
    mesh = MeshSpec(**{axis: 2})
    ranks = rank_pool.each(2, trained, folder, mesh, f"127.0.0.1:{free_port()}")
    for one, *both in zip(single[1:], *(reports[1:] for reports in ranks), strict=True):
        for report in both:
            assert report.model_flops == pytest.approx(one.model_flops, rel=1e-12)  # summed in another order
            assert report.trained_tokens == one.trained_tokens
            assert report.mfu is not None and 0 < report.mfu == report.hfu
            assert report.seconds["communication"] > 0
            assert all(spent >= 0 for spent in report.seconds.values())
        assert both[0].memory_gib == both[1].memory_gib
        if axis == "shard":  # every size divides by two
            for kind in ("weights", "gradients"):
                assert both[0].memory_gib[kind] == one.memory_gib[kind] / 2
    traces = {path.name for path in folder.glob(f"{'-'.join(map(str, vars(mesh).values()))}/profile/*")}
    assert traces == {f"step-000002-rank-{rank}.trace.json.gz" for rank in range(2)}
