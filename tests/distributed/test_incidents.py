"""A step that goes wrong on one rank: all ranks do the same about it, and the row is named whoever had it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import TrainingError
from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.incidents import read_log
from posttrain_lib.training.job import TrainJob
from tests.distributed.test_mesh_training import HEADS, label, run_on
from tests.distributed.test_two_ranks import figures, run_rank
from tests.oracles.tiny_job import make_job
from tests.support.rank_pool import RankPool
from tests.unit.training.test_incidents import config, named

MESHES = [MeshSpec(shard=2), MeshSpec(replicate=2), MeshSpec(tensor=2), MeshSpec(context=2)]
LOG = "work/incidents.jsonl"


def events(reports: list[StepReport]) -> list[tuple[int, str]]:
    """What happened at which step, without the figures."""
    return [(report.step, report.event.split(":")[0]) for report in reports]


@pytest.mark.parametrize("action", ["skip", "roll_back"])
@pytest.mark.parametrize("mesh", MESHES, ids=label)
def test_all_ranks_go_on_as_one_process_does(mesh: MeshSpec, action: str, rank_pool: RankPool, tmp_path: Path) -> None:
    settings = config({"non_finite": action}, steps=7, checkpoint={"every_steps": 2, "keep_last": 2})
    alone = run_rank(make_job(tmp_path, settings, work="alone", architecture=HEADS))
    ranks = run_on(rank_pool, make_job(tmp_path, settings), mesh)
    assert events(ranks[0]) == events(alone) and any(event for _, event in events(alone)[1:-1])
    losses = [[report.loss for report in reports if report.loss is not None] for reports in (alone, ranks[0])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert [figures(report) for report in ranks[1]] == [figures(report) for report in ranks[0]]
    (entry,) = read_log(tmp_path / LOG)
    (expected,) = read_log(tmp_path / "alone/incidents.jsonl")
    assert entry["suspects"] == expected["suspects"] == [named(TokenStore(tmp_path / "train"))]
    assert sorted(entry["rows"]) == sorted(expected["rows"])


def refused(rank: int, job: TrainJob, rendezvous: str) -> str:
    with pytest.raises(TrainingError) as stopped:
        run_rank(dataclasses.replace(job, rank=rank, rendezvous=rendezvous))
    return str(stopped.value)


def test_by_default_every_rank_stops_with_the_same_words(rank_pool: RankPool, tmp_path: Path) -> None:
    job = dataclasses.replace(make_job(tmp_path, config({})), mesh=MeshSpec(shard=2))
    one, other = rank_pool.each(2, refused, job, f"127.0.0.1:{free_port()}")
    assert one == other and "row:17" in one
