"""A run's own figures: what the loop reports of FLOPs, time and memory, and traces of chosen steps."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import train
from posttrain_lib.training.timing import KINDS
from tests.oracles.tiny_job import make_job, tiny_config


def reports_of(job: TrainJob) -> list[tuple[StepReport, float]]:
    """Every report, with the seconds from asking for it to having it."""
    events = train(job)
    found: list[tuple[StepReport, float]] = []
    while True:
        begun = time.perf_counter()
        report = next(events, None)
        if report is None:
            return found
        found.append((report, time.perf_counter() - begun))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[StepReport, float]]]:
    folder = tmp_path_factory.mktemp("measured")
    profile = {"steps": [2, 4], "memory": True}
    config = tiny_config(steps=5, profile=profile, activation_checkpointing="full")
    return folder / "work", reports_of(make_job(folder, config))


def test_the_parts_of_a_step_are_its_time(measured: tuple[Path, list[tuple[StepReport, float]]]) -> None:
    _, reports = measured
    assert reports[0][0].seconds == {}, "step 0 trains nothing"
    for report, waited in reports[1:]:
        assert report.seconds_of_step == report.step
        assert set(report.seconds) <= {*KINDS, "other"}
        assert {"data", "forward", "backward", "optimizer", "other"} <= set(report.seconds)
        assert all(spent >= 0 for spent in report.seconds.values())
        assert sum(report.seconds.values()) <= waited
        assert ("evaluation" in report.seconds) == (report.held_out is not None)
        assert report.seconds.get("checkpoint", 0.0) > 0 or "checkpoint" not in report.event
        # what the throughput goes by leaves evaluation and checkpoint out
        trained = sum(report.seconds[kind] for kind in ("data", "forward", "backward", "optimizer"))
        assert trained <= report.step_seconds + 1e-9  # sums of floats


def test_shares_of_the_peak_fit_each_other(measured: tuple[Path, list[tuple[StepReport, float]]]) -> None:
    _, reports = measured
    for report, _ in reports[1:]:
        assert report.mfu is not None and report.hfu is not None
        assert report.hfu / report.mfu == pytest.approx(report.hardware_flops / report.model_flops)
        # a forward of the blocks once more: less than a third, for the head is not run again
        assert 1 < report.hardware_flops / report.model_flops < 4 / 3
        peak = report.model_flops / report.step_seconds / report.mfu
        assert peak == pytest.approx(reports[1][0].model_flops / reports[1][0].step_seconds / (reports[1][0].mfu or 0))


def test_memory_by_kind_is_that_of_the_model(measured: tuple[Path, list[tuple[StepReport, float]]]) -> None:
    _, reports = measured
    held = reports[-1][0].memory_gib
    assert held["gradients"] == held["weights"] > 0
    assert held["optimizer"] == pytest.approx(2 * held["weights"], rel=0.01)  # and a counter a tensor
    assert "activations" not in held, "blocks that compute again keep theirs out of sight"
    assert max(held.values()) < reports[-1][0].peak_memory_gib


def test_only_chosen_steps_are_traced(measured: tuple[Path, list[tuple[StepReport, float]]]) -> None:
    work, _ = measured
    names = sorted(path.name for path in (work / "profile").iterdir())
    assert names == [f"step-{step:06d}-rank-0.{kind}" for step in (2, 4) for kind in ("memory.json", "trace.json.gz")]
    with gzip.open(work / "profile" / names[1], "rt") as file:
        trace = json.load(file)
    operators = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= operators
    sizes = json.loads((work / "profile" / names[0]).read_text())
    assert sizes[0]["net_bytes"] != 0 and abs(sizes[0]["net_bytes"]) >= abs(sizes[-1]["net_bytes"])


def test_measuring_changes_no_bit(tmp_path: Path, measured: tuple[Path, list[tuple[StepReport, float]]]) -> None:
    """Profiled steps and the first one, which is looked into, end where those of a run without either do: the loss of
    every step depends on the weights of the one before."""
    _, reports = measured
    plain = reports_of(make_job(tmp_path, tiny_config(steps=5, activation_checkpointing="full")))
    assert [report.loss for report, _ in plain] == [report.loss for report, _ in reports]
    kept = reports_of(make_job(tmp_path, tiny_config(steps=5), work="kept"))  # the first step is looked into
    assert [report.loss for report, _ in kept] == [report.loss for report, _ in reports]
    assert kept[-1][0].memory_gib["activations"] > 0
