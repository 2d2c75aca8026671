"""Step ``train``: the training job, launched on Ray workers, watched from here."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.schema.manifests import ArtifactRef, Check
from posttrain_lib.schema.reports import StepReport, TrainResult
from steps import prepare_data
from steps.base import Manifests, Step, StepContext, StepResult, known_digests

if TYPE_CHECKING:
    from posttrain_lib.data.live_feed import LiveSpec

METRICS = "metrics.jsonl"
QUARANTINE = "live_quarantine.jsonl"


def settings(config: RunConfig) -> dict[str, Any]:
    """The train section, the vocabulary's padding, adapters and backend, and from compute what can change the result's
    bits: mesh, threads, device."""
    compute = config.compute.model_dump(mode="json", include={"threads_per_worker", "device"})
    compute["mesh"] = dataclasses.asdict(config.compute.mesh_spec())
    live = prepare_data.settings(config) if config.data.on_the_fly else None
    return {
        "train": config.train.model_dump(mode="json"),
        "compute": compute,
        "on_the_fly": live,
        "pad_vocabulary_to": config.model.pad_vocabulary_to,
        **config.model.model_dump(mode="json", include={"lora", "backend"}),
    }


def work_settings(config: RunConfig) -> dict[str, Any]:
    """The settings without mesh and threads: a checkpoint goes on with another number of them."""
    wanted = settings(config)
    return {**wanted, "compute": {"device": wanted["compute"]["device"]}}


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """Token stores, the tokenizer that they must have been made with, the model with the proof that it was verified,
    and the rows themselves where training tokenises them."""
    data, model = manifests["prepare_data"].outputs, manifests["convert_model"].outputs
    rows = prepare_data.inputs(config, manifests)
    return {
        **{name: ref for name, ref in rows.items() if config.data.on_the_fly or not name.startswith("source:")},
        "train": data["train"],
        "held_out": data["held_out"],
        "model": model["model"],
        "verification": model["verification"],
    }


def body(context: StepContext) -> StepResult:
    """Run the job to its end; checkpoints live in the work folder until the result is published."""
    from posttrain_lib.compute.launch import launch
    from posttrain_lib.models.hf_spec import marks
    from posttrain_lib.training.job import TrainJob

    context.work.mkdir(parents=True, exist_ok=True)
    made_by = _check_made_by_this_tokenizer(context)
    job = TrainJob(
        model_folder=context.inputs["model"].uri,
        train_store=context.inputs["train"].uri,
        held_out_store=context.inputs["held_out"].uri,
        work_dir=str(context.work),
        train=context.config.train,
        live=_live_spec(context, made_by) if context.config.data.on_the_fly else None,
        pad_vocabulary_to=context.config.model.pad_vocabulary_to,
        lora=context.config.model.lora,
        backend=context.config.model.backend,
    )
    result, reports = _watch(launch(job, context.config.compute), context)
    checkpoints = Path(result.last_checkpoint).parent
    checkpoints.rename(context.out / "checkpoints")
    (context.out / METRICS).write_text(
        "".join(json.dumps(dataclasses.asdict(report)) + "\n" for report in reports), encoding="utf-8"
    )
    refused = {}
    if (context.work / QUARANTINE).exists():
        shutil.copyfile(context.work / QUARANTINE, context.out / QUARANTINE)
        refused["quarantine"] = (QUARANTINE, "quarantine")
    best = result.best_checkpoint or result.last_checkpoint
    return StepResult(
        outputs={
            "last": (f"checkpoints/{Path(result.last_checkpoint).name}", "checkpoint"),
            "best": (f"checkpoints/{Path(best).name}", "checkpoint"),
            "metrics": (METRICS, "metrics"),
            **refused,
        },
        checks=[Check("every step's loss was finite", True, len(reports), reason="a non-finite one stops training")],
        metrics={
            **dataclasses.asdict(result),
            **throughput(reports),
            "sources": shares(reports),
            "rows": _rows(reports),
            **marks(context.config.model.backend),
        },
        summary=summary(result),
    )


def summary(result: TrainResult) -> str:
    """One line for the terminal."""
    parts = [f"{result.step} steps{' (stopped early)' if result.stopped_early else ''}"]
    if result.data_end:
        parts.append(result.data_end)
    if result.best_held_out is not None:
        parts.append(f"best held-out loss {result.best_held_out:.4f}")
        if result.first_held_out is not None and result.best_held_out > result.first_held_out:
            parts[-1] += f", worse than the {result.first_held_out:.4f} before training"
    return "; ".join(parts)


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


def shares(reports: list[StepReport]) -> dict[str, dict[str, float]]:
    """Per source, what it gave over the whole run: tokens, units (examples, or what was packed as one), and its
    shares of both."""
    tokens, units = Counter[str](), Counter[str]()
    for report in reports:
        tokens.update(report.source_tokens)
        units.update(report.source_units)
    return {
        name: {
            "tokens": tokens[name],
            "units": units[name],
            "token_share": tokens[name] / max(1, tokens.total()),
            "unit_share": units[name] / max(1, units.total()),
        }
        for name in tokens
    }


def _rows(reports: list[StepReport]) -> dict[str, int]:
    """What became of the rows that training read itself; empty where they were prepared."""
    return reports[-1].rows if reports else {}


def _check_made_by_this_tokenizer(context: StepContext) -> dict[str, str]:
    """The fingerprint of the run's tokenizer and template, which is also that of the token stores.

    Raises:
        DataError: it is not.
    """
    from posttrain_lib.data.fingerprint import check_fingerprint, fingerprint
    from posttrain_lib.data.token_store import TokenStore
    from steps.evaluate import load_tokenizer

    expected = fingerprint(load_tokenizer(context.config, context.inputs))
    for name in ("train", "held_out"):
        check_fingerprint(TokenStore(context.inputs[name].uri), expected)
    return expected


def _live_spec(context: StepContext, made_by: dict[str, str]) -> LiveSpec:
    """What a live feed reads: the files as they are now, which must be those that the run's key was made of."""
    from posttrain_lib.data.live_feed import LiveSpec
    from posttrain_lib.data.sources import list_files

    prepare_data.check_unchanged(context)
    config, known = context.config.data, known_digests()
    if "chat_template" in context.inputs:
        config = config.model_copy(update={"chat_template": context.inputs["chat_template"].uri})
    paths = [context.inputs[f"source:{source.name}"].uri for source in config.sources]
    files = tuple(tuple(list_files(path, known)) for path in paths)
    return LiveSpec(config, context.inputs["tokenizer"].uri, files, made_by)


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


STEP: Step = Step("train", 1, "steps.train", settings, inputs, body, work_settings)

if __name__ == "__main__":
    from steps.pipeline import main

    main("train")
