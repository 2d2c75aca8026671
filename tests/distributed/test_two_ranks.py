"""Two processes over gloo against one: the same training, checkpoints that either layout reads."""

from __future__ import annotations

import dataclasses
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.config.train import TrainConfig
from posttrain_lib.errors import TrainingError
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, tiny_config

#: float32 sums in another order (6e-8 each), grown through a few updates of Adam; measured: up to 2e-7
NEAR: dict[str, Any] = {"rel": 1e-5, "abs": 1e-6}


TwoRanks = Callable[..., list[list[StepReport]]]


def run_rank(job: TrainJob, stop_after: int | None = None) -> list[StepReport]:
    reports = []
    for report in train(job):
        reports.append(report)
        if report.step == stop_after:
            break
    return reports


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[TwoRanks]:
    """Runs a job on two processes; they stay up for the whole module, importing torch takes them seconds.

    A process keeps its rank: torch remembers where in a device mesh it stood, beyond the process group's end.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as first, ProcessPoolExecutor(1, mp_context=spawn) as second:

        def run(job: TrainJob, stop_after: int | None = None) -> list[list[StepReport]]:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                rendezvous = f"127.0.0.1:{probe.getsockname()[1]}"
            jobs = [
                dataclasses.replace(job, rank=rank, mesh=MeshSpec(shard=2), rendezvous=rendezvous) for rank in range(2)
            ]
            running = [pool.submit(run_rank, job, stop_after) for pool, job in zip((first, second), jobs, strict=True)]
            return [done.result(timeout=240) for done in running]

        yield run


#: what of a report depends on neither clocks, memory nor layout
FIGURES = (
    *("step", "total_steps", "loss", "lr", "grad_norm", "trained_weight", "real_tokens", "slot_tokens", "tokens_seen"),
    *("model_flops", "held_out", "event", "source_loss", "source_tokens", "source_units", "rows"),
)


def figures(report: StepReport) -> dict[str, Any]:
    """Those of :data:`FIGURES`."""
    return {name: getattr(report, name) for name in FIGURES}


def assert_near(one: list[StepReport], other: list[StepReport]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.step == right.step
        for name in ("loss", "grad_norm", "held_out", "source_loss"):
            expected = getattr(right, name)
            assert getattr(left, name) == (expected if expected is None else pytest.approx(expected, **NEAR)), name
        counts = ("step", "lr", "trained_weight", "real_tokens", "slot_tokens", "tokens_seen", "model_flops", "event")
        assert [getattr(left, name) for name in counts] == [getattr(right, name) for name in counts]


# untied: a head of its own in the root; recomputation inside sharded blocks; clip far below the norm, so that a wrong
# total norm would show
LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"clip_norm": 0.1}, {}),
    ({"activation_checkpointing": "full", "micro_batch_rows": 1}, {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("changes", "architecture"), LAYOUTS)
def test_two_ranks_train_as_one(
    two_ranks: TwoRanks, tmp_path: Path, changes: dict[str, Any], architecture: dict[str, Any]
) -> None:
    config = tiny_config(steps=4, **changes)
    make_job(tmp_path, config, architecture=architecture)
    alone = run_rank(make_job(tmp_path, config, work="alone"))
    first, second = two_ranks(make_job(tmp_path, config, work="two"))
    assert_near(first, alone)
    assert [figures(report) for report in first] == [figures(report) for report in second]
    one = load_model_state(tmp_path / "alone/checkpoints/step-00000004")
    other = load_model_state(tmp_path / "two/checkpoints/step-00000004")
    assert list(one) == list(other)
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)  # Adam divides by small moments


def test_resuming_on_the_same_and_on_another_layout(two_ranks: TwoRanks, tmp_path: Path) -> None:
    config: TrainConfig = tiny_config(steps=6)
    whole, _ = two_ranks(make_job(tmp_path, config, work="whole"))
    two_ranks(make_job(tmp_path, config, work="cut"), stop_after=4)
    copy = tmp_path / "alone/checkpoints"
    copy.parent.mkdir()
    (tmp_path / "cut/checkpoints").rename(copy)

    # two ranks saved, one goes on: the same stream of data, sums in another order
    alone = run_rank(make_job(tmp_path, config, work="alone"))
    assert alone[0].event.startswith("resumed")
    assert_near(alone[1:], whole[5:])

    # two ranks saved, two go on: the same bits
    two_ranks(make_job(tmp_path, config, work="again"), stop_after=4)
    resumed, _ = two_ranks(make_job(tmp_path, config, work="again"))
    assert [figures(report) for report in resumed[1:]] == [figures(report) for report in whole[5:]]


def test_a_non_finite_loss_on_one_rank_stops_both_with_the_same_words(two_ranks: TwoRanks, tmp_path: Path) -> None:
    config = tiny_config(steps=9, clip_norm=None, optimizer={"name": "sgd", "lr": 1e30}, schedule={"name": "constant"})
    with pytest.raises(TrainingError, match="of step 2 is not finite"):
        two_ranks(make_job(tmp_path, config))
