"""Step ``train``: the training job, launched on Ray workers, watched from here."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.schema.manifests import ArtifactRef, Check
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.schema.trajectory import TRAJECTORY
from steps import beside, prepare_data, rollouts
from steps.base import Manifests, Step, StepContext, StepResult, known_digests
from steps.watch import METRICS, watch

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.data.live_feed import LiveSpec

QUARANTINE = "live_quarantine.jsonl"
PROFILE = "profile"
INCIDENTS = "incidents.jsonl"


def settings(config: RunConfig) -> dict[str, Any]:
    """The train section with its loss, the vocabulary's padding, adapters and backend, and from compute what can change
    the result's bits: mesh, threads, device."""
    compute = config.compute.model_dump(mode="json", include={"threads_per_worker", "device", "offload"})
    compute["mesh"] = dataclasses.asdict(config.compute.mesh_spec())
    live = prepare_data.settings(config) if config.data.on_the_fly else None
    return {
        "train": config.trained.model_dump(mode="json"),
        "compute": compute,
        "on_the_fly": live,
        "pad_vocabulary_to": config.model.pad_vocabulary_to,
        **config.model.model_dump(mode="json", include={"lora", "backend"}),
        "companion": None if config.companion is None else config.companion.kept,
        "pad_token": None if config.reward is None else config.reward.pad_token,
        **({} if config.grpo is None else {"grpo": rollouts.settings(config), **rollouts.habits(config)}),
    }


def work_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that a checkpoint is bound to: the others may change in the middle of a run, as mesh and threads,
    how often to save, and what to do about incidents."""
    wanted = settings(config)
    train = {name: value for name, value in wanted["train"].items() if name in TRAJECTORY}
    kept = {name: value for name, value in wanted.items() if name not in ("held_out", "shown_answers")}
    return {**kept, "train": train, "compute": {"device": wanted["compute"]["device"]}}


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """Token stores, the tokenizer that they must have been made with, the model with the proof that it was verified,
    reward models among the graders, and the rows themselves where training tokenises them."""
    rollouts.check_answers(config, manifests)
    data, model = manifests["prepare_data"].outputs, manifests["convert_model"].outputs
    rows = prepare_data.inputs(config, manifests)
    return {
        **beside.inputs(config, manifests),
        **rollouts.judges(config),
        **{name: ref for name, ref in rows.items() if config.data.on_the_fly or not name.startswith("source:")},
        "train": data["train"],
        "held_out": data["held_out"],
        "model": rollouts.start_model(config, manifests),
        "verification": model["verification"],
        **({} if config.grpo is None else {name: data[name] for name in ("train_prompts", "prompts")}),
    }


def body(context: StepContext) -> StepResult:
    """Run the job to its end; checkpoints live in the work folder until the result is published."""
    from posttrain_lib.compute.launch import launch
    from posttrain_lib.models.hf_spec import marks
    from posttrain_lib.training.job import TrainJob
    from steps.loading import load_tokenizer

    planned = _planned(context)
    context.work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(context.config, context.inputs)
    made_by = _check_made_by_this_tokenizer(context, tokenizer)
    job = TrainJob(
        model_folder=context.inputs["model"].uri,
        train_store=context.inputs["train"].uri,
        held_out_store=context.inputs["held_out"].uri,
        work_dir=str(context.work),
        train=context.config.trained,
        live=_live_spec(context, made_by) if context.config.data.on_the_fly else None,
        pad_vocabulary_to=context.config.model.pad_vocabulary_to,
        lora=context.config.model.lora,
        backend=context.config.model.backend,
        companion=beside.companion(context),
        score_padding=beside.score_padding(context.config, tokenizer),
        rollouts=rollouts.job(context, tokenizer),
    )
    result, reports, tracked = watch(launch(job, context.config.compute), context)
    _bring_checkpoints(result, context.out / "checkpoints")
    if (context.work / "logs").is_dir():  # of ranks that are not this process
        (context.work / "logs").rename(context.out / "logs")
    (context.out / METRICS).write_text(
        "".join(json.dumps(dataclasses.asdict(report)) + "\n" for report in reports), encoding="utf-8"
    )
    besides = {}
    if (context.work / INCIDENTS).exists():
        shutil.copyfile(context.work / INCIDENTS, context.out / INCIDENTS)
        besides["incidents"] = (INCIDENTS, "incidents")
    if (context.work / QUARANTINE).exists():
        shutil.copyfile(context.work / QUARANTINE, context.out / QUARANTINE)
        besides["quarantine"] = (QUARANTINE, "quarantine")
    if (context.work / PROFILE).exists():
        shutil.copytree(context.work / PROFILE, context.out / PROFILE)
        besides["profile"] = (PROFILE, "profile")
    for name in ("rollouts", "ledger"):
        if (context.work / f"{name}.jsonl").exists():
            shutil.copyfile(context.work / f"{name}.jsonl", context.out / f"{name}.jsonl")
            besides[name] = (f"{name}.jsonl", name)
    best = result.best_checkpoint or result.last_checkpoint
    return StepResult(
        outputs={
            "last": (f"checkpoints/{Path(result.last_checkpoint).name}", "checkpoint"),
            "best": (f"checkpoints/{Path(best).name}", "checkpoint"),
            "metrics": (METRICS, "metrics"),
            **besides,
        },
        checks=[_finite(result, reports)],
        metrics={
            **dataclasses.asdict(result),
            **throughput(reports),
            "sources": shares(reports),
            "rows": _rows(reports),
            "tracking": tracked,
            "plan": planned,
            **marks(context.config.model.backend),
        },
        summary=summary(result),
    )


def _planned(context: StepContext) -> dict[str, Any] | None:
    """The job's plan, said in short before it is launched; None for a class of transformers.

    Raises:
        PlanError: a device has too little memory, or the mesh does not fit the model.
    """
    from posttrain_lib.compute.plan import make_plan, plan_lines, refuse_what_does_not_fit
    from posttrain_lib.models.families import spec_from_folder

    if context.config.model.backend == "hf":
        return None
    companion = context.config.companion
    frozen = spec_from_folder(context.inputs["companion"].uri) if companion and companion.kept == "live" else None
    plan = make_plan(spec_from_folder(context.inputs["model"].uri), context.config, frozen)
    for line in plan_lines(plan, short=True):
        context.say(line)
    refuse_what_does_not_fit(plan)
    return plan.as_json()


def _finite(result: TrainResult, reports: list[StepReport]) -> Check:
    """What of the steps reached the weights."""
    name, steps = "every step's loss was finite", sum(report.step > 0 for report in reports)
    if not result.incidents:
        return Check(name, True, steps, reason="a non-finite one stops training, unless train.incidents says otherwise")
    reason = f"{result.incidents} steps went wrong and were left out, as train.incidents says; see {INCIDENTS}"
    return Check("every step that was taken was finite", True, steps, reason=reason)


def _bring_checkpoints(result: TrainResult, out: Path) -> None:
    """The job's checkpoints, linked: the work folder has them too until the result is published, which takes a while
    for its digests, and whoever is killed before that goes on from there. Of those in a store, the last and the best,
    fetched: a step's result is local."""
    from posttrain_lib.checkpoint.manager import fetch_checkpoint

    last = result.last_checkpoint
    if "://" not in last:
        shutil.copytree(Path(last).parent, out, copy_function=_link)
        return
    for url in dict.fromkeys([last, result.best_checkpoint or last]):
        fetch_checkpoint(url, out)


def _link(file: str, link: str) -> None:
    try:
        os.link(file, link)
    except OSError:  # a file system without links
        shutil.copyfile(file, link)


def summary(result: TrainResult) -> str:
    """One line for the terminal."""
    parts = [f"{result.step} steps{' (stopped early)' if result.stopped_early else ''}"]
    if result.data_end:
        parts.append(result.data_end)
    if result.best_held_out is not None:
        parts.append(f"best {result.held_out_is} {result.best_held_out:.4f}")
        if result.first_held_out is not None and result.best_held_out > result.first_held_out:
            parts[-1] += f", worse than the {result.first_held_out:.4f} before training"
    return "; ".join(parts)


def throughput(reports: list[StepReport]) -> dict[str, Any]:
    """Means over all optimiser steps but the first, which pays for warm-up.

    ``time_shares``: where the time of whole steps went, evaluation and checkpoints included. ``memory_gib``: of each
    kind the most that a rank held.
    """
    timed = [report for report in reports if report.step > 0][1:]
    seconds = max(sum(report.step_seconds for report in timed), 1e-9)
    slots = sum(report.slot_tokens for report in timed)
    real = sum(report.real_tokens for report in timed)
    first = min((report.step for report in reports if report.step > 0), default=0)
    spent, held = Counter[str](), dict[str, float]()
    for report in timed:
        spent.update(report.seconds if report.seconds_of_step > first else {})
        held |= {kind: max(size, held.get(kind, 0.0)) for kind, size in report.memory_gib.items()}
    return {
        "tokens_per_second": real / seconds,
        "trained_tokens_per_second": sum(report.trained_tokens for report in timed) / seconds,
        "fill": real / max(slots, 1),
        "data_wait_share": sum(report.data_wait_seconds for report in timed) / seconds,
        "train_seconds": seconds,
        "model_tflops": sum(report.model_flops for report in timed) / seconds / 1e12,
        **{name: _over_time(timed, name) for name in ("mfu", "mfu_measured", "hfu")},
        "time_shares": {kind: time / max(spent.total(), 1e-9) for kind, time in spent.items()},
        "memory_gib": held,
        "peak_memory_gib": max((report.peak_memory_gib for report in reports), default=0.0),
    }


def _over_time(reports: list[StepReport], name: str) -> float | None:
    """A share of the peak over all these steps: their own, weighed by how long they took. None where none has it."""
    known = [(value, report.step_seconds) for report in reports if (value := getattr(report, name)) is not None]
    return sum(value * time for value, time in known) / sum(time for _, time in known) if known else None


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


def _check_made_by_this_tokenizer(context: StepContext, tokenizer: ChatTokenizer) -> dict[str, str]:
    """The fingerprint of the run's tokenizer and template, which is also that of the token stores.

    Raises:
        DataError: it is not.
    """
    from posttrain_lib.data.fingerprint import check_fingerprint, fingerprint
    from posttrain_lib.data.token_store import TokenStore

    expected = fingerprint(tokenizer)
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


STEP: Step = Step("train", 1, "steps.train", settings, inputs, body, work_settings)

if __name__ == "__main__":
    from posttrain_lib.compute.launch import under_torchrun
    from steps.pipeline import main

    if under_torchrun():
        from posttrain_lib.compute import torchrun

        torchrun.run(lambda: main("train"))
    else:
        main("train")
