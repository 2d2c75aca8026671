"""Watching a training job: its reports go to the terminal, to metrics.jsonl and to whatever ``tracking`` names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.tracking.build import build_sinks
from posttrain_lib.tracking.sinks import JsonLines, RunFacts, Sink, Sinks
from posttrain_lib.tracking.terminal import Terminal
from steps.base import StepContext

METRICS = "metrics.jsonl"


def watch(
    events: Iterator[StepReport], context: StepContext
) -> tuple[TrainResult, list[StepReport], list[dict[str, Any]]]:
    """Drain the job: (its result, every step's report, how each sink went).

    Reports are also kept in the work folder, so that a resumed job has the whole curve.
    """
    kept = JsonLines(context.work / METRICS)
    reports = {report.step: report for report in kept.reports()}
    config = context.config
    asked = {**config.model_dump(mode="json"), "train": config.trained.model_dump(mode="json")}
    facts = RunFacts(config.name, context.work.name, asked)
    own: list[Sink] = [kept, Terminal(context.say, sys.stdout)]
    sinks = Sinks([*own, *build_sinks(context.config.tracking)], facts, context.work, context.say)
    result: TrainResult | None = None
    first = True
    try:
        while result is None:
            try:
                report = next(events)
            except StopIteration as stop:
                result = stop.value
                continue
            if first and report.step == 0 and reports:
                context.say(_begun_again(max(reports)))
            first = False
            reports[report.step] = report
            sinks.step(report)
            context.observe(report)
    finally:
        sinks.close(None if result is None else vars(result))
    return result, [reports[step] for step in sorted(reports)], sinks.receipt()


def _begun_again(step: int) -> str:
    """Why a run that was further begins at step 0."""
    return (
        f"train: WARNING: this run had come to step {step}, and there is no checkpoint of it that can be read (damaged "
        "ones are named below); it begins again at step 0"
    )
