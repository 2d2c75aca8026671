"""The training loop of every recipe on a CUDA device, against the same run on the CPU.

Needs pydantic beside PyTorch, transformers, numpy and pytest; where it is missing the file says so and is left out.

Tolerances. Both runs round differently ordered float32 sums, 6e-8 each, and four updates of Adam, which divides by the
root of small moments, carry that on: 1e-3 of a loss is far below what a wrong mask, reference or scale does to it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pydantic", reason="run files are read by pydantic, which is not installed here")

from posttrain_lib.checkpoint.manager import load_model_state  # noqa: E402
from posttrain_lib.config.model import Lora  # noqa: E402
from posttrain_lib.schema.companion import Companion  # noqa: E402
from posttrain_lib.schema.reports import StepReport  # noqa: E402
from posttrain_lib.training.job import TrainJob  # noqa: E402
from posttrain_lib.training.loop import train  # noqa: E402
from tests.oracles.tiny_job import make_job, tiny_config, write_model  # noqa: E402
from tests.support.pair_jobs import PADDING, live, pair_config, pair_job, stored_logprobs  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

DEVICE = "cuda"
STEPS = 4
NEAR = 1e-3
LORA = Lora(rank=4, alpha=8.0, targets=("attention", "mlp"), seed=3)
RECIPES = ("sft", "sft with adapters", "dpo, live", "dpo, stored", "dpo, base", "reward", "distill")


def job_of(recipe: str, folder: Path, **train_changes: object) -> TrainJob:
    """A few steps of a tiny model on the CPU."""
    if recipe.startswith("sft"):
        config = tiny_config(steps=STEPS, **train_changes)
        return make_job(folder, config, lora=LORA if "adapters" in recipe else None)
    if recipe == "distill":
        config = tiny_config(steps=STEPS, loss="distill", **train_changes)
        job = make_job(folder, config)
        if not (folder / "teacher").exists():
            write_model(folder / "teacher", seed=1)
        return dataclasses.replace(job, companion=live(folder, "teacher"))
    if recipe == "reward":
        return pair_job(folder, pair_config("reward", steps=STEPS, **train_changes), score_padding=PADDING)
    job = pair_job(folder, pair_config(steps=STEPS, **train_changes), lora=LORA if "base" in recipe else None)
    if "stored" in recipe:
        return dataclasses.replace(job, companion=stored_logprobs(folder))
    return dataclasses.replace(job, companion=Companion("base") if "base" in recipe else live(folder))


def run(job: TrainJob, work: Path, device: str, stop_after: int | None = None) -> list[StepReport]:
    reports = []
    for report in train(dataclasses.replace(job, work_dir=str(work), device=device)):
        reports.append(report)
        if report.step == stop_after:
            break
    return reports


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_trains_as_a_cpu_does(recipe: str, tmp_path: Path) -> None:
    job = job_of(recipe, tmp_path, precision="fp32")
    expected, found = (run(job, tmp_path / f"run-{number}", device) for number, device in enumerate(("cpu", DEVICE)))
    assert [report.step for report in found] == [report.step for report in expected]
    for left, right in zip(found, expected, strict=True):
        assert left.loss == (right.loss if right.loss is None else pytest.approx(right.loss, rel=NEAR))
        assert left.held_out == (right.held_out if right.held_out is None else pytest.approx(right.held_out, rel=NEAR))
        assert left.rows == right.rows
    assert len({report.loss for report in found[1:]}) > 1, "the weights moved"


@pytest.mark.parametrize("recipe", RECIPES)
def test_half_precision_stays_near(recipe: str, tmp_path: Path) -> None:
    """bfloat16 rounds by 2^-8, and the losses here, means of hundreds of tokens, are moved by less than four times."""
    expected = run(job_of(recipe, tmp_path, precision="fp32"), tmp_path / "cpu", "cpu")
    found = run(job_of(recipe, tmp_path, precision="bf16"), tmp_path / "half", DEVICE)
    for left, right in zip(found, expected, strict=True):
        assert left.loss == (right.loss if right.loss is None else pytest.approx(right.loss, rel=4 * 2**-8))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", ["sft", "dpo, live"])
def test_a_resumed_run_has_the_same_bits(recipe: str, precision: str, tmp_path: Path) -> None:
    job = job_of(recipe, tmp_path, precision=precision)
    whole = run(job, tmp_path / "whole", DEVICE)
    run(job, tmp_path / "cut", DEVICE, stop_after=2)
    resumed = run(job, tmp_path / "cut", DEVICE)
    assert resumed[0].step == 2 and resumed[0].event.startswith("resumed")
    assert [report.loss for report in resumed[1:]] == [report.loss for report in whole if report.step > 2]
    weights, found = (load_model_state(tmp_path / name / f"checkpoints/step-{STEPS:08d}") for name in ("whole", "cut"))
    assert weights.keys() == found.keys()
    assert [name for name, value in weights.items() if not torch.equal(value, found[name])] == []
