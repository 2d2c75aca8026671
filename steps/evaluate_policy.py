"""Step ``evaluate`` of recipe grpo: the graders' word on held-out prompts, and tasks, before and after training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.errors import RolloutError
from posttrain_lib.schema.manifests import ArtifactRef, Check
from steps import evaluate, rollouts
from steps.base import Manifests, Step, StepContext, StepResult
from steps.loading import load_base, load_tokenizer, read_prompts

if TYPE_CHECKING:
    from posttrain_lib.evaluation.bootstrap import Scores
    from posttrain_lib.evaluation.tasks import Task, TaskResult
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.rl.playing import Playing
    from posttrain_lib.rl.prompts import RolloutPrompt
    from posttrain_lib.rl.rewards.pool import GraderPool
    from posttrain_lib.schema.rollouts import Grade

#: what the graders say of held-out prompts, as gates may name it
METRICS = ("pass@1", "reward")


@dataclass(frozen=True)
class _Found:
    """Of one model: the texts of its greedy answers, the graders' scores by name and how many gradings failed, each
    task's result; ``wrong`` is ``rl.figures.held_out_value`` by ``measure``."""

    texts: list[str]
    scores: dict[str, Scores]
    failed: float
    measure: str
    wrong: float
    results: Mapping[str, TaskResult]


def settings(config: RunConfig) -> dict[str, Any]:
    """The evaluation section without its gates, the graders, how answers are drawn, which checkpoint is looked at."""
    assert config.grpo is not None
    of_sft = evaluate.settings(config)
    grpo = config.grpo.model_dump(mode="json", include={"rewards", "rollout", "environment", "constraint", "held_out"})
    return {**of_sft, "grpo": grpo, "threads": config.compute.threads_per_worker}


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The model before and after, held-out prompts, the tokenizer, the rows of tasks, reward models that grade."""
    found = {**evaluate.inputs(config, manifests), **rollouts.judges(config)}
    return {**found, "model": rollouts.start_model(config, manifests)}


def body(context: StepContext) -> StepResult:
    """Let the starting model answer, then the trained weights in the same module."""
    from posttrain_lib.checkpoint.adapters import trained_weights
    from posttrain_lib.checkpoint.manager import load_model_state
    from posttrain_lib.rl.figures import MEASURES
    from posttrain_lib.rl.prompts import fitting
    from posttrain_lib.rl.prompts import read_prompts as read_rollout_prompts
    from posttrain_lib.rl.rewards.pool import GraderPool

    config, grpo = context.config, context.config.grpo
    assert grpo is not None
    tokenizer, tasks = load_tokenizer(config, context.inputs), evaluate.tasks_of(config)
    evaluate.check_judges(tasks, context.inputs["tokenizer"].uri)
    playing = rollouts.playing(context, tokenizer)
    held_out = playing.asked(read_rollout_prompts(Path(context.inputs["prompts"].uri)))
    asked = fitting(held_out, rollouts.longest_prompt(config))[0][: max(1, grpo.held_out.prompts)]
    model = load_base(context)
    graders = GraderPool(rollouts.specs(grpo), workers=grpo.grader_processes)
    try:
        context.say("evaluate: the model before training")
        before = _evaluate(context, model, playing, asked, graders, tasks, None)
        state = load_model_state(context.inputs["checkpoint"].uri)
        model.load_state_dict(trained_weights(model, state, config.model.lora))
        context.say("evaluate: the model after training")
        after = _evaluate(context, model, playing, asked, graders, tasks, before.measure)
    finally:
        graders.close()
    metrics: dict[str, Any] = {
        "held_out_is": MEASURES[before.measure],
        "held_out_before": {"all": before.wrong},
        "held_out_after": {"all": after.wrong},
        "failed_gradings": {"before": before.failed, "after": after.failed},
        "generations": _side_by_side(config, asked, before.texts, after.texts),
        "comparison": _comparison(config, tasks, before, after),
    }
    (context.out / "evaluation.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False), encoding="utf-8")
    evaluate.write_scores(context.out / evaluate.SCORES, {"before": before.results, "after": after.results})
    told = [f"{name} {_mean(before, name)} -> {_mean(after, name)}" for name in after.scores]
    if before.failed or after.failed:
        told.append(f"gradings that failed, and count for nothing: {before.failed:g} -> {after.failed:g}")
    return StepResult(
        outputs={"evaluation": ("evaluation.json", "evaluation"), "task_scores": (evaluate.SCORES, "task_scores")},
        checks=[
            Check(
                "held-out prompts are answered better",
                after.wrong < before.wrong,
                after.wrong,
                before.wrong,
                "before training",
            )
        ],
        metrics=metrics,
        summary=f"on {len(asked)} held-out prompts: {', '.join(told)}",
    )


def _evaluate(
    context: StepContext,
    model: Decoder,
    playing: Playing,
    prompts: Sequence[RolloutPrompt],
    graders: GraderPool,
    tasks: Mapping[str, Task],
    measure: str | None,
) -> _Found:
    """``measure``: what the model before was measured by, whose value it is compared with."""
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.evaluation.tasks import Given
    from posttrain_lib.rl.figures import failed_gradings, held_out_scores, held_out_value, measure_of

    config, tokenizer = context.config, playing.tokenizer
    texts, grades, ways = _answers(context, model, playing, prompts, graders)
    scores = held_out_scores(grades, ways)
    measure = measure or measure_of(scores)
    if measure is None or (wrong := held_out_value(scores, measure)) is None:
        raise RolloutError(
            "no greedy answer to a held-out prompt was graded",
            where="grpo.rewards",
            got="; ".join(sorted({grade.failure or "" for grade in grades if grade.reward is None}))[:500],
            fix="mend the grader that is named",
        )
    store = TokenStore(Path(context.inputs["held_out"].uri))
    given = Given(
        store, config.train.row_tokens, read_prompts(Path(context.inputs["prompts"].uri)), config.evaluation.seed
    )
    results = {title: evaluate.run_task(context, title, task, model, tokenizer, given) for title, task in tasks.items()}
    return _Found(texts[::ways], scores, failed_gradings(grades), measure, wrong, results)


def _mean(found: _Found, name: str) -> str:
    mean = found.scores[name].mean if name in found.scores else None
    return "-" if mean is None else f"{mean:.3f}"


def _answers(
    context: StepContext,
    model: Decoder,
    playing: Playing,
    prompts: Sequence[RolloutPrompt],
    graders: GraderPool,
) -> tuple[list[str], list[Grade], int]:
    """(texts, grades, answers to each prompt): the greedy answer of each prompt, then those drawn as in training."""
    import dataclasses

    from posttrain_lib.models.families import spec_from_folder
    from posttrain_lib.models.vocabulary import with_padded_vocabulary
    from posttrain_lib.rl.engine.embedded import EmbeddedEngine
    from posttrain_lib.rl.playing import play_all
    from posttrain_lib.rl.trajectories import seed_for, to_grade, with_failures

    config, grpo, tokenizer = context.config, context.config.grpo, playing.tokenizer
    assert grpo is not None
    spec = with_padded_vocabulary(spec_from_folder(context.inputs["model"].uri), config.model.pad_vocabulary_to)
    engine = EmbeddedEngine(model, spec, window=config.train.row_tokens, slots=64, decode=tokenizer.decode)
    drawn = rollouts.sampling(grpo, tokenizer)
    ways = [dataclasses.replace(drawn, temperature=0.0), *[drawn] * grpo.held_out.samples]
    wanted = [
        (prompt, way, seed_for(config.evaluation.seed, prompt.name, -1, number))
        for prompt in prompts
        for number, way in enumerate(ways)
    ]
    trajectories = play_all(engine, playing.play, wanted)
    engine.close()
    grades = with_failures(trajectories, graders.grade(to_grade(trajectories)))
    return [one.answer.text for one in trajectories], grades, len(ways)


def _comparison(config: RunConfig, tasks: Mapping[str, Task], before: _Found, after: _Found) -> list[dict[str, Any]]:
    from posttrain_lib.evaluation.comparison import compare

    seed = config.evaluation.seed
    rows = compare("held_out", before.scores, after.scores, seed)
    for title, task in tasks.items():
        earlier, later = before.results[title], after.results[title]
        rows += compare(title, earlier.scores, {**later.scores, **task.compare(earlier, later)}, seed)
    return rows


def _side_by_side(
    config: RunConfig, prompts: Sequence[RolloutPrompt], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    shown = zip(prompts[: config.evaluation.samples], before, after, strict=False)
    return [
        {
            "prompt": str(prompt.messages[-1]["content"]),
            "expected": prompt.answer or "",
            "before": earlier,
            "after": later,
        }
        for prompt, earlier, later in shown
    ]


STEP: Step = Step("evaluate", 1, "steps.evaluate_policy", settings, inputs, body)
