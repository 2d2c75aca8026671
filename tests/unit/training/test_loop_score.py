"""A reward model in the one training loop: whole or through adapters, its checkpoints, and what it goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.checkpoint.adapters import trained_weights
from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.config.model import Lora
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.models.score import SCORE
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, tiny_config

SCORING: dict[str, Any] = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "pad_token_id": 0,
}
LORA = Lora(rank=4, alpha=8.0, targets=("attention", "mlp"), seed=3)


def job_in(folder: Path, work: str, lora: Lora | None, **changes: Any) -> TrainJob:
    config = tiny_config(loss="tests.support.score_loss:NearTwo", **changes)
    return make_job(folder, config, work=work, architecture=SCORING, lora=lora, pad_vocabulary_to=48)


def run(job: TrainJob, stop_after: int | None = None) -> list[StepReport]:
    reports = []
    for report in train(job):
        reports.append(report)
        if report.step == stop_after:
            break
    return reports


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_head_is_trained_kept_and_gone_on_from(lora: Lora | None, tmp_path: Path) -> None:
    whole = run(job_in(tmp_path, "whole", lora, steps=4))
    last, first = whole[-1].held_out, whole[0].held_out
    assert last is not None and first is not None
    assert last["all"] < first["all"] - 0.5
    run(job_in(tmp_path, "cut", lora, steps=4), stop_after=2)
    resumed = run(job_in(tmp_path, "cut", lora, steps=4))
    assert [report.loss for report in resumed[1:]] == [report.loss for report in whole[3:]]
    one, other = (load_model_state(tmp_path / f"{work}/checkpoints/step-00000004") for work in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(other[name], value) for name, value in one.items())
    assert one[SCORE].shape == (1, 16)
    assert (lora is None) == ("norm.weight" in one)
    model = load_model(tmp_path / "model", pad_vocabulary_to=48)
    weights = trained_weights(model, one, lora)
    assert weights.keys() == model.state_dict().keys()
    assert torch.equal(weights[SCORE], one[SCORE]) and not torch.equal(weights[SCORE], model.score.weight)
