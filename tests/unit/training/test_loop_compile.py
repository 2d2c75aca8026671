"""Compiled blocks in the one training loop."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine"),
]
STEPS = 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_is_the_same_run(tmp_path: Path, precision: str) -> None:
    """Losses, checkpoints under the same names, nothing compiled after the first step, and going on without."""
    torch._dynamo.reset()
    results: dict[str, list[StepReport]] = {"none": [], "blocks": []}
    graphs = []
    for compilation, reports in results.items():
        config = tiny_config(steps=STEPS, compile=compilation, precision=precision)
        for report in train(make_job(tmp_path, config, work=compilation)):
            reports.append(report)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[STEPS] == graphs[0] and graphs[-1] > graphs[STEPS]
    assert graphs[-1] == graphs[STEPS + 2], "documents differ from step to step, the code does not"
    for one, other in zip(results["none"], results["blocks"], strict=True):
        # Another rounding of float32 (6e-8) or of bfloat16's products (4e-3), through the updates of Adam.
        near = 1e-4 if precision == "fp32" else 1e-2
        assert other.loss == (None if one.loss is None else pytest.approx(one.loss, rel=near))
    last = f"checkpoints/step-{STEPS:08d}"
    one, other = load_model_state(tmp_path / "none" / last), load_model_state(tmp_path / "blocks" / last)
    assert list(one) == list(other)

    shutil.rmtree(tmp_path / "blocks" / last)
    resumed = list(train(make_job(tmp_path, tiny_config(steps=STEPS, precision=precision), work="blocks")))
    assert resumed[0].event.startswith("resumed")
    assert resumed[-1].loss == pytest.approx(results["none"][-1].loss, rel=near)
