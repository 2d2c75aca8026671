"""What a run would only find out later, found from its config alone: by the plan, and by the step ``inputs``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.config.data import GENERATED_FORMATS, Source
from posttrain_lib.data.formats import FORMATS, check_fields
from posttrain_lib.data.sources import files_of
from posttrain_lib.errors import ConfigError
from posttrain_lib.registry import resolve

#: row format -> what its rows become; those of all others become documents
_KINDS = {"preference": "pair", "prompts": "prompt"}

#: row formats without turns: nothing of them is a prompt and its answer
_WITHOUT_PROMPTS = ("text", "tokens")

#: recipe -> where its run file names a frozen model of its own
COMPANION_FIELDS = {
    "dpo": "dpo.reference.path",
    "distill": "distill.teacher.path",
    "grpo": "grpo.reference.path, grpo.teacher.path",
}


def check_names(config: RunConfig) -> None:
    """Formats and their fields, local files, the loss and what it learns from, the optimiser, mixture and devices.

    Raises:
        ConfigError, DataError: naming the field or the file.
    """
    from posttrain_lib.data.chat_tokenizer import read_template
    from posttrain_lib.optim import named_optimizer

    for source in config.data.sources:
        check_fields(source.format, source.fields)
        if source.path is not None and "://" not in source.path:
            files_of(source.path)
    if config.data.chat_template is not None:
        read_template(config.data.chat_template)
    check_start(config)
    named_optimizer(config.train.optimizer)
    _check_weights(config)
    _check_rollouts(config)
    check_evaluation(config)
    _check_compute(config)


def check_start(config: RunConfig) -> None:
    """What the first step needs and no file tells: rows that the loss learns from and, where they are generated, of a
    format in which they are; something to make a tokenizer of.

    Raises:
        ConfigError: naming the source, or the field.
    """
    # Imports torch; a plan of a misspelt file should not wait for it.
    from posttrain_lib.losses import loss_of

    loss = loss_of(config.trained)
    wanted = loss.kind
    for source in config.data.sources:
        _check_generated(source)
        kind = _KINDS.get(source.format, "document")
        if kind != wanted:
            fitting = ", ".join(name for name in sorted(FORMATS) if _KINDS.get(name, "document") == wanted)
            raise ConfigError(
                f"recipe {config.recipe} does not train on rows of this format: its loss learns from {wanted}s",
                where=f"data.sources: {source.name}: format",
                got=f"{source.format} (rows become {kind}s)",
                expected=f"one of {fitting}",
                fix=_recipes_for(kind),
            )
    scratch = config.model.from_scratch
    if scratch is not None and scratch.tokenizer is None and not any(s.generate for s in config.data.sources):
        raise ConfigError(
            "there is no generated source to train a tokenizer on",
            where="model.from_scratch.tokenizer",
            fix="name a tokenizer folder, or add a source with 'generate'",
        )


def _check_generated(source: Source) -> None:
    made = None if source.generate is None else GENERATED_FORMATS[source.generate.of]
    if made is not None and source.format not in made:
        raise ConfigError(
            "no rows of this format are generated",
            where=f"data.sources: {source.name}: format",
            got=source.format,
            expected=" or ".join(made),
        )


def _recipes_for(kind: str) -> str:
    fitting = {
        "document": "recipes sft and distill train",
        "pair": "recipes dpo and reward train",
        "prompt": "recipe grpo trains",
    }
    return (
        f"{fitting[kind]} on {kind}s: take the source out, change the recipe, or name a loss of your own in train.loss"
    )


def check_evaluation(config: RunConfig) -> None:
    """Rows and names of the evaluation's tasks, the metrics that gates name, and lm_eval where it is asked for.

    Raises:
        ConfigError, DataError: naming field, file or row.
    """
    from posttrain_lib.adapters.lm_eval_process import check_installed
    from steps.evaluate import tasks_of

    if (asked := config.evaluation.lm_eval) is not None:
        check_installed()
        if asked.include_path is not None and not Path(asked.include_path).is_dir():
            raise ConfigError(
                "there is no such folder of task files", where="evaluation.lm_eval.include_path", got=asked.include_path
            )
    tasks = tasks_of(config)
    _check_prompts(config, [title for title, task in tasks.items() if "prompts" in task.needs])
    for title, task in tasks.items():
        task.check()
        if "held_out" in task.needs and any(_KINDS.get(source.format) for source in config.data.sources):
            raise ConfigError(
                "the task reads held-out documents, and the sources give pairs or prompts",
                where=f"evaluation.tasks: {title}",
                fix="take the task out: the held-out loss of what is trained is in the report in any case",
            )
    known = {title: task.metrics for title, task in tasks.items()} | {"held_out": _figures(config)}
    for gate in config.evaluation.gates.metrics:
        title, _, metric = gate.partition(".")
        if metric not in known[title]:
            near = difflib.get_close_matches(metric, known[title], n=1)
            raise ConfigError(
                "a gate names a metric that its task does not have",
                where="evaluation.gates.metrics",
                got=gate,
                expected=f"one of {', '.join(f'{title}.{name}' for name in known[title])}",
                fix=f"did you mean '{title}.{near[0]}'?" if near else "name one of these",
            )


def _check_prompts(config: RunConfig, tasks: Sequence[str]) -> None:
    """Where something asks the run's own held-out prompts, a source gives some; ``tasks``: names of those that ask."""
    asking = [*(["exact_match_prompts"] if config.evaluation.exact_match_prompts else []), *tasks]
    if asking and all(source.format in _WITHOUT_PROMPTS for source in config.data.sources):
        raise ConfigError(
            "held-out prompts are asked, and no source has any",
            where=f"evaluation: {', '.join(asking)}",
            got=f"rows of format {', '.join(dict.fromkeys(source.format for source in config.data.sources))}",
            expected="a source of conversations, pairs or prompts",
            fix="leave it out, or give the task a 'file' of its own",
        )


def _figures(config: RunConfig) -> tuple[str, ...]:
    from posttrain_lib.evaluation.calibration import METRICS
    from posttrain_lib.losses import loss_of
    from steps import evaluate_policy

    if config.grpo is not None:
        samples = config.grpo.held_out.samples
        sampled = tuple(f"sampled_pass@{k}" for k in sorted({1, samples}) if samples)
        return (*evaluate_policy.METRICS, *sampled, *(f"reward/{term.shown_as}" for term in config.grpo.rewards))
    figures = ("loss", *loss_of(config.trained).figures)
    return figures if config.reward is None else (*figures, *METRICS)


def check_model(config: RunConfig, folder: Path, tokenizer: str | Path | None) -> None:
    """A model folder by its headers, and the files of its tokenizer, which is its own where none is given.

    Raises:
        ModelError, DataError: naming file, tensor or field.
    """
    from posttrain_lib.checkpoint.folder_headers import check_folder_headers
    from posttrain_lib.data.chat_tokenizer import check_files

    check_folder_headers(folder, config.model.backend, tokenizer or folder)
    check_files(Path(tokenizer or folder))


def _check_rollouts(config: RunConfig) -> None:
    """Graders, environment, constraint and engine with their options, and the advantage rule. What loads much, and what
    is the user's, is not made."""
    if config.grpo is None:
        return
    from posttrain_lib.rl.advantages import rule_of
    from posttrain_lib.rl.constrain import named_constraint
    from posttrain_lib.rl.environments.base import ENVIRONMENTS, environment_maker
    from posttrain_lib.rl.rewards.base import check_grader
    from posttrain_lib.rl.run import check_engine
    from steps.rollouts import constraint, environment, specs

    for spec in specs(config.grpo):
        check_grader(spec)
    if (played := environment(config)) is not None:
        if played.name in ENVIRONMENTS:
            environment_maker(played)
        else:
            resolve(played.name, ENVIRONMENTS, what="environment", where="grpo.environment.name")
    if (bound := constraint(config)) is not None:
        named_constraint(bound)
    rule_of(config.grpo.advantage)
    check_engine(config.grpo.rollout.engine, config.grpo.rollout.options)


def _check_weights(config: RunConfig) -> None:
    """At every step of the schedules some source has a weight."""
    from posttrain_lib.data.store_feed import schedule

    mixture = config.train.mixture
    shares = [] if mixture is None else [mixture.sources.get(source.name) for source in config.data.sources]
    weights: list[Any] = [None if share is None else share.weight for share in shares]
    if not weights or any(weight is None for weight in weights):
        return  # by size, which is above 0
    schedules = [schedule(weight) for weight in weights]
    # Linear in between: where all are 0 somewhere, they are at a step that one of them names.
    for step in sorted({step for points in schedules for step, _ in points}):
        if not any(_weight_at(points, step) > 0 for points in schedules):
            raise ConfigError(
                "no source has a weight above 0",
                where="train.mixture.sources",
                got=f"step {step}: all are 0",
                fix="give a source a weight there, or take the weights out",
            )


def _weight_at(points: tuple[tuple[int, float], ...], step: int) -> float:
    import numpy as np

    steps, weights = zip(*points, strict=True)
    return float(np.interp(step, steps, weights))


def _check_compute(config: RunConfig) -> None:
    """What this machine alone decides; of a cluster's machines nothing is known here."""
    from posttrain_lib.training.device import pick_device

    compute = config.compute
    if compute.launcher == "in_process" and compute.address is not None:
        raise ConfigError(
            "compute.address names a Ray cluster, and the launcher 'in_process' starts none of its workers",
            where="compute.address",
            got=compute.address,
            fix="use compute.launcher: ray, or leave the address out",
        )
    if compute.address is None:
        pick_device(compute.device, 0)
