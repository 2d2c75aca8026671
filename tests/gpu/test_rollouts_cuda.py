"""Whole jobs of rollouts on a CUDA device: policy, embedded engine, guard and graders.

Needs pydantic beside PyTorch, transformers, numpy and pytest; where it is missing the file says so and is left out. The
engine's own promises are tested by ``tests/contracts/test_rollout_engine.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pydantic", reason="run files are read by pydantic, which is not installed here")

from posttrain_lib.checkpoint.manager import load_model_state  # noqa: E402
from posttrain_lib.rl.run import train_on_rollouts  # noqa: E402
from posttrain_lib.schema.reports import StepReport  # noqa: E402
from posttrain_lib.training import pulse  # noqa: E402
from tests.support.rollout_jobs import rollout_job  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

#: log-probabilities of a float32 engine are around -5, and float32 sums of other orders differ by 2e-6: half the square
#: of that is nothing
NEAR = 1e-7
#: bfloat16 rounds logits of size 1 to 8 by 2^-8 of that and the softmax's sum likewise: differences of some 0.02
HALF = 1e-3


@pytest.fixture(autouse=True)
def _fresh_pulse() -> Iterator[None]:
    pulse.begin()
    yield
    pulse.begin()


def run(folder: Path, work: str = "work", *, stop_after: int | None = None, **changes: Any) -> list[StepReport]:
    """All reports, or those up to a step's."""
    job = dataclasses.replace(rollout_job(folder, work, **changes), device="cuda")
    assert job.rollouts is not None
    reports = []
    events = train_on_rollouts(job, job.rollouts)
    for report in events:
        reports.append(report)
        if report.step == stop_after:
            break
    events.close()
    return reports


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_learns_what_is_rewarded(precision: str, tmp_path: Path) -> None:
    """The guard compares engine and policy at every push."""
    half = precision == "bf16"
    rollouts = {"engine_options": {"dtype": "bfloat16" if half else "float32"}, "max_mismatch": HALF if half else NEAR}
    train = {"optimizer": {"lr": 2e-2}, "precision": precision}
    reports = run(tmp_path, updates=30, save_every=30, train=train, rollouts=rollouts)
    rewards = [report.figures["reward/short"] for report in reports[1:]]
    assert len(rewards) == 30 and sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits(precision: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"updates": 6, "save_every": 2, "train": {"precision": precision},
                               "rollouts": {"max_mismatch": 0.1}}  # fmt: skip
    whole = run(tmp_path, "whole", **changes)
    run(tmp_path, "cut", stop_after=3, **changes)
    pulse.begin()
    resumed = run(tmp_path, "cut", **changes)
    assert "resumed" in resumed[0].event and resumed[-1].step == 6
    assert [report.loss for report in resumed[1:]] == [r.loss for r in whole if r.step > resumed[0].step]
    weights, found = (load_model_state(tmp_path / name / "checkpoints/step-00000006") for name in ("whole", "cut"))
    assert weights.keys() == found.keys()
    assert [name for name, value in weights.items() if not torch.equal(value, found[name])] == []


def test_rollouts_go_on_while_the_policy_trains(tmp_path: Path) -> None:
    """On one device both are on it, which is said."""
    changes: dict[str, Any] = {"max_staleness": 1, "placement": "split", "rollouts": {"max_mismatch": None}}
    reports = run(tmp_path, updates=8, **changes)
    assert reports[-1].step == 8
    assert 0 < max(report.figures["rollout/staleness_max"] for report in reports[1:]) <= 1
    if torch.cuda.device_count() == 1:
        assert any("no device besides the policy's" in report.event for report in reports)
