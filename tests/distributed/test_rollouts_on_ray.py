"""A job of rollouts through the one launch interface: the controller in the driver, the policy on two actors."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.compute.launch import launch
from posttrain_lib.compute.processes import SESSION_FILE
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ConfigError
from posttrain_lib.rl.job import RolloutJob
from posttrain_lib.rl.rewards.base import RewardSpec
from posttrain_lib.rl.settings import HeldOut, RLSettings
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.schema.rollouts import Answer, Sampling
from posttrain_lib.training.job import TrainJob
from tests.contracts.test_policy_role import actors
from tests.oracles.tiny_job import tiny_config, write_model
from tests.support.launched import Family, wait_for

ON_TWO = ComputeConfig(devices_per_node=2, device="cpu", threads_per_worker=1)


def even(answer: Answer) -> float:
    """Half of all answers are better than the rest."""
    return float(len(answer.text) % 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and prompts."""
    folder = tmp_path_factory.mktemp("rollouts")
    write_model(folder / "model", vocab_size=320)
    rows = list(generate_rows(50, 0))
    build_tokenizer((turn["content"] for row in rows for turn in row["messages"]), 320, folder / "model")
    for name, count in (("train", 12), ("held_out", 2)):
        lines = [
            {
                "prompt_ids": [5 + number, 6, 7, 8],
                "messages": [{"role": "user", "content": "?"}],
                "answer": None,
                "source": name,
                "row_id": str(number),
            }
            for number in range(count)
        ]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def job_in(folder: Path, work: str, updates: int = 3, reference: bool = True) -> TrainJob:
    train = tiny_config(
        steps=updates,
        loss="policy",
        loss_options={"kl_weight": 0.05} if reference else {},
        optimizer={"lr": 1e-3},
        checkpoint={"every_steps": 1},
    )
    rollouts = RolloutJob(
        prompts=str(folder / "train"),
        held_out=str(folder / "held_out"),
        tokenizer=str(folder / "model"),
        settings=RLSettings(
            updates=updates,
            prompts_per_batch=2,
            group_size=4,
            sampling=Sampling(8),
            advantage="verl:grpo",
            save_every=1,
            held_out=HeldOut(prompts=2, every_steps=2),
        ),
        rewards=(RewardSpec("tests.distributed.test_rollouts_on_ray:even", "even"),),
        longest_prompt=16,
        reference=str(folder / "model") if reference else None,
        max_mismatch=1e-3,
    )
    stores = {"train_store": "", "held_out_store": ""}
    return TrainJob(str(folder / "model"), work_dir=str(folder / work), train=train, rollouts=rollouts, **stores)


def drain(
    job: TrainJob, compute: ComputeConfig, watch: Callable[[StepReport], None] = lambda report: None
) -> tuple[list[StepReport], TrainResult]:
    events, reports = launch(job, compute), []
    while True:
        try:
            reports.append(next(events))
        except StopIteration as end:
            return reports, end.value
        watch(reports[-1])


@pytest.mark.slow
def test_two_actors_are_trained_as_one_process_is(folder: Path) -> None:
    alone, first = drain(job_in(folder, "alone"), ComputeConfig(device="cpu", threads_per_worker=1))
    family: list[Family] = []
    both, second = drain(job_in(folder, "two"), ON_TWO, lambda report: family.append(Family(os.getpid())))
    assert [report.step for report in both] == [report.step for report in alone] == [0, 1, 2, 3]
    assert first.step == second.step == 3 and Path(second.last_checkpoint).is_dir()
    assert alone[0].held_out == both[0].held_out  # by greedy answers of the same weights
    # The first update learns from the same draws; float32 sums over two ranks are in another order. Later draws may
    # differ where a weight did.
    assert alone[1].loss == pytest.approx(both[1].loss, rel=1e-4, abs=1e-6)
    assert alone[1].grad_norm == pytest.approx(both[1].grad_norm, rel=1e-4)
    for report in both[1:]:
        assert report.figures["policy/reference_kl"] >= 0 and report.figures["mismatch/kl"] < 1e-3
    assert not (folder / "two" / SESSION_FILE).exists()
    assert sorted(path.name for path in (folder / "two" / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    ended = [pid for pid in family[-1].alive() if pid != os.getpid()]
    wait_for(lambda: not [pid for pid in family[-1].alive() if pid in ended], 30, "Ray's processes to end")


@pytest.mark.slow
def test_a_lost_actor_is_replaced_and_the_run_goes_on(folder: Path) -> None:
    killed: list[int] = []

    def kill_one(report: StepReport) -> None:
        if report.step == 2 and not killed:
            killed.append(actors()[1])
            os.kill(killed[0], signal.SIGKILL)

    reports, result = drain(job_in(folder, "killed", updates=4, reference=False), ON_TWO, kill_one)
    assert killed and result.step == 4
    again = next(number for number, report in enumerate(reports) if report.event == "resumed")
    assert [report.step for report in reports[again + 1 :]] == list(range(reports[again].step + 1, 5))


def test_torchrun_is_refused(folder: Path) -> None:
    compute: dict[str, Any] = {**vars(ON_TWO), "launcher": "torchrun"}
    with pytest.raises(ConfigError, match="driven from one process"):
        drain(job_in(folder, "torchrun"), ComputeConfig(**compute))
