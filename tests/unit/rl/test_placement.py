"""Where the engine is: colocated it sleeps while the policy learns, split it is never told to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from posttrain_lib.config.grpo import GRPO
from posttrain_lib.rl.controller import Controller, Roles
from posttrain_lib.rl.ledger import Ledger
from posttrain_lib.rl.prompts import RolloutPrompt
from posttrain_lib.rl.run import engine_device
from posttrain_lib.rl.settings import HeldOut, RLSettings
from posttrain_lib.rl.sync_guard import SyncGuard
from posttrain_lib.rl.trajectories import Play
from posttrain_lib.rl.version_log import VersionLog
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.schema.rollouts import Answer, Grade, Request, Sampling, TrainSample
from posttrain_lib.training.job import TrainJob
from tests.oracles.tiny_job import VOCABULARY
from tests.support.policy_jobs import policy_job
from tests.support.table_roles import Table, TableEngine, TablePolicy


class Told(TableEngine):
    """Keeps what it is told, one word for any number of requests in a row."""

    def __init__(self, told: list[str], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.told = told

    def submit(self, requests: Sequence[Request]) -> None:
        if self.told[-1:] != ["asked"]:
            self.told.append("asked")
        super().submit(requests)

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        self.told.append("push")
        return super().push(weights, version)

    def sleep(self) -> None:
        self.told.append("sleep")
        super().sleep()

    def wake(self) -> None:
        self.told.append("wake")
        super().wake()


class ToldPolicy(TablePolicy):
    """The same, of what the engine must not be awake for."""

    def __init__(self, told: list[str], job: TrainJob) -> None:
        super().__init__(job)
        self.told = told

    def update(self, samples: Sequence[TrainSample]) -> StepReport:
        self.told.append("update")
        return super().update(samples)

    def logprobs(self, samples: Sequence[TrainSample], *, temperature: float | None = None) -> list[np.ndarray]:
        if temperature is None:  # not the canaries of a push
            self.told.append("old")
        return super().logprobs(samples, temperature=temperature)


class ByLength:
    """By the length of what an answer decodes to, so that answers differ."""

    def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        return [Grade(float(len(answer.text) % 3)) for answer in answers]

    def close(self) -> None:
        pass


def told_in_a_run(folder: Path, placement: Literal["colocated", "split"], staleness: int) -> list[str]:
    """Two batches of two updates each, no held-out look."""
    told: list[str] = []
    model = Table.random(VOCABULARY)
    job = policy_job(model.write(folder / "model").parent)
    engine = Told(told, model, window=32, slots=4, decode=lambda ids: "x" * sum(ids))
    settings = RLSettings(
        updates=4,
        updates_per_batch=2,
        prompts_per_batch=2,
        group_size=2,
        sampling=Sampling(4),
        max_staleness=staleness,
        placement=placement,
        needs_old=True,
        held_out=HeldOut(prompts=0),
    )
    prompts = [RolloutPrompt((1, 2, 3 + number), ({"content": "?"},), None, "s", str(number)) for number in range(8)]
    guard = SyncGuard([(1, 2, 3, 4)], bound=1e-3)
    roles = Roles(ToldPolicy(told, job), engine, ByLength(), guard)
    controller = Controller(
        prompts, [], roles, settings, Play(lambda ids: "x" * sum(ids)), Ledger(VersionLog(folder / "ledger"))
    )
    assert [report.step for report in controller.run()] == [0, 1, 2, 3, 4]
    return told


def test_a_colocated_engine_sleeps_while_the_policy_learns(tmp_path: Path) -> None:
    batch = ["asked", "sleep", "old", "update", "update", "wake", "push"]
    assert told_in_a_run(tmp_path, "colocated", 0) == ["push", *batch, *batch]


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_engine_of_its_own_is_never_told_to_sleep(tmp_path: Path, staleness: int) -> None:
    told = told_in_a_run(tmp_path, "split", staleness)
    assert told.count("push") == 3 and told.count("update") == 4
    assert not {"sleep", "wake"} & set(told)


def test_the_engine_has_a_device_of_its_own_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert engine_device(first, 2, "split", said.append) == torch.device("cuda", 2)
    assert engine_device(first, 2, "colocated", said.append) == first
    assert engine_device(torch.device("cpu"), 2, "split", said.append) == torch.device("cpu")
    assert not said
    assert engine_device(first, 3, "split", said.append) == first
    assert "no device besides the policy's" in said[0]


def test_the_placement_follows_from_the_staleness() -> None:
    def grpo(**changes: Any) -> GRPO:
        return GRPO.model_validate({"rewards": [{"name": "length"}], **changes})

    assert grpo().placed == "colocated" and grpo(max_staleness=1).placed == "split"
    assert grpo(placement="split").placed == "split"
    with pytest.raises(ValidationError, match="asks nothing ahead"):
        grpo(placement="colocated", max_staleness=1)
