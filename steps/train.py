"""Step ``train``: the training job, launched on Ray workers, watched from here."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.schema.manifests import ArtifactRef, Check
from posttrain_lib.schema.reports import StepReport, TrainResult
from steps.base import Manifests, Step, StepContext, StepResult

METRICS = "metrics.jsonl"


def settings(config: RunConfig) -> dict[str, Any]:
    """The train section, and from compute what can change the result's bits: workers, threads, device."""
    compute = config.compute.model_dump(mode="json", include={"workers", "threads_per_worker", "device"})
    return {"train": config.train.model_dump(mode="json"), "compute": compute}


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """Token stores, and the model together with the proof that it was verified."""
    data, model = manifests["prepare_data"].outputs, manifests["convert_model"].outputs
    return {
        "train": data["train"],
        "held_out": data["held_out"],
        "model": model["model"],
        "verification": model["verification"],
    }


def body(context: StepContext) -> StepResult:
    """Run the job to its end; checkpoints live in the work folder until the result is published."""
    from posttrain_lib.compute.launch import launch
    from posttrain_lib.training.job import TrainJob

    context.work.mkdir(parents=True, exist_ok=True)
    job = TrainJob(
        model_folder=context.inputs["model"].uri,
        train_store=context.inputs["train"].uri,
        held_out_store=context.inputs["held_out"].uri,
        work_dir=str(context.work),
        train=context.config.train,
    )
    result, reports = _watch(launch(job, context.config.compute), context)
    checkpoints = Path(result.last_checkpoint).parent
    checkpoints.rename(context.out / "checkpoints")
    (context.out / METRICS).write_text(
        "".join(json.dumps(dataclasses.asdict(report)) + "\n" for report in reports), encoding="utf-8"
    )
    best = result.best_checkpoint or result.last_checkpoint
    return StepResult(
        outputs={
            "last": (f"checkpoints/{Path(result.last_checkpoint).name}", "checkpoint"),
            "best": (f"checkpoints/{Path(best).name}", "checkpoint"),
            "metrics": (METRICS, "metrics"),
        },
        checks=[Check("every step's loss was finite", True, len(reports), reason="a non-finite one stops training")],
        metrics={**dataclasses.asdict(result), **throughput(reports)},
        summary=f"{result.step} steps{' (stopped early)' if result.stopped_early else ''}, best held-out loss "
        f"{result.best_held_out:.4f}"
        if result.best_held_out is not None
        else f"{result.step} steps",
    )


def throughput(reports: list[StepReport]) -> dict[str, float]:
    """Means over all optimiser steps but the first, which pays for warm-up."""
    timed = [report for report in reports if report.step > 0][1:]
    seconds = sum(report.step_seconds for report in timed)
    slots = sum(report.slot_tokens for report in timed)
    return {
        "tokens_per_second": sum(report.real_tokens for report in timed) / max(seconds, 1e-9),
        "fill": sum(report.real_tokens for report in timed) / max(slots, 1),
        "data_wait_share": sum(report.data_wait_seconds for report in timed) / max(seconds, 1e-9),
        "train_seconds": seconds,
        "model_tflops": sum(report.model_flops for report in timed) / max(seconds, 1e-9) / 1e12,
        "peak_memory_gib": max((report.peak_memory_gib for report in reports), default=0.0),
    }


def _watch(events: Iterator[StepReport], context: StepContext) -> tuple[TrainResult, list[StepReport]]:
    """Drain the job. Reports are also kept in the work folder, so that a resumed job has the whole curve."""
    path = context.work / METRICS
    reports = {report.step: report for report in _earlier(path)}
    bar = ProgressLine()
    with open(path, "a", encoding="utf-8") as log:
        while True:
            try:
                report = next(events)
            except StopIteration as stop:
                return stop.value, [reports[step] for step in sorted(reports)]
            reports[report.step] = report
            log.write(json.dumps(dataclasses.asdict(report)) + "\n")
            log.flush()
            line = bar.line(report)
            if line:
                context.say(line)
            context.observe(report)


def _earlier(path: Path) -> Iterator[StepReport]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield StepReport(**json.loads(line))
        except ValueError:
            continue  # the line a killed process was writing; that step is trained and reported again


class ProgressLine:
    """A progress bar in lines: Metaflow and log files show whole lines only. One every few seconds, plus events."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every_seconds = every_seconds
        self._last = -every_seconds
        self._started: tuple[float, int] | None = None

    def line(self, report: StepReport) -> str | None:
        """The line to print for this report, or None to stay quiet."""
        now = time.monotonic()
        if self._started is None:
            self._started = (now, report.step)
        notable = bool(report.event) or report.held_out is not None or report.step == report.total_steps
        if not notable and now - self._last < self._every_seconds:
            return None
        self._last = now
        return self._format(report, now)

    def _format(self, report: StepReport, now: float) -> str:
        filled = round(20 * report.step / max(1, report.total_steps))
        parts = [f"[{'#' * filled}{'.' * (20 - filled)}] {report.step}/{report.total_steps}"]
        if report.step > 0:
            parts += [f"loss {report.loss:.4f}", f"{report.tokens_per_second:,.0f} tok/s", f"fill {report.fill:.3f}"]
        if report.mfu is not None:
            parts.append(f"MFU {report.mfu:.1%}")
        if report.held_out is not None:
            parts.append(f"held-out {report.held_out['all']:.4f}")
        started, first = self._started or (now, report.step)
        if first < report.step < report.total_steps:
            left = (now - started) / (report.step - first) * (report.total_steps - report.step)
            parts.append(f"ETA {int(left) // 60}:{int(left) % 60:02d}")
        if report.event:
            parts.append(f"({report.event})")
        return "  ".join(parts)


STEP: Step = Step("train", 1, "steps.train", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("train")
