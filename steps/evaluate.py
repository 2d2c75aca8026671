"""Step ``evaluate``: held-out loss per source, exact match, greedy samples and tasks, before and after training; of a
reward model, how far its scores can be believed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.schema.manifests import ArtifactRef, Check
from steps import beside, score_data
from steps.base import Manifests, Step, StepContext, StepResult, known_digests
from steps.loading import load_base, load_tokenizer, read_prompts

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.evaluation.bootstrap import Scores
    from posttrain_lib.evaluation.calibration import PairScores
    from posttrain_lib.evaluation.perplexity import Means
    from posttrain_lib.evaluation.tasks import Given, Task, TaskResult
    from posttrain_lib.models.decoder import Decoder

#: every example's scores, one line for each task, model and example
SCORES = "task_scores.jsonl"
#: of the evaluation section: demands, another step's, and by which name a folder was found
_NO_MATTER: Any = {"gates": True, "lm_eval": True, "tasks": {"__all__": {"reward_model": {"origin"}}}}


@dataclass(frozen=True)
class _Found:
    """What was found of one model: held-out means, each document's loss, generations, each task's result, and a reward
    model's scores of the held-out pairs."""

    held_out: Means
    documents: Scores
    texts: list[str]
    results: Mapping[str, TaskResult]
    pairs: PairScores | None


def settings(config: RunConfig) -> dict[str, Any]:
    """The evaluation section without its gates and what is asked of the exported folder, the loss, which checkpoint is
    looked at, and how it is padded."""
    return {
        "evaluation": config.evaluation.model_dump(mode="json", exclude=_NO_MATTER),
        "loss": [config.trained.loss, config.trained.loss_options],
        "row_tokens": config.train.row_tokens,
        "checkpoint": config.export.checkpoint,
        "pad_vocabulary_to": config.model.pad_vocabulary_to,
        **config.model.model_dump(mode="json", include={"lora", "backend"}),
        "template": config.data.template_variables,
        "companion": None if config.companion is None else config.companion.kept,
        "precision": _precision(config),
        "reward": None if config.reward is None else [config.reward.pad_token, config.train.seed],
    }


def _precision(config: RunConfig) -> str:
    """Of the held-out loss: full, but where a frozen model's words are stored theirs, which is that of training. In
    another, a policy that is the reference still would seem to have moved, by the rounding of its answers' sums."""
    return config.train.precision if score_data.is_needed(config) else "fp32"


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The model before and after, the held-out tokens and prompts, the tokenizer, the rows of tasks."""
    data, made = manifests["prepare_data"].outputs, manifests["inputs"].outputs
    found = {
        "model": manifests["convert_model"].outputs["model"],
        "checkpoint": manifests["train"].outputs[config.export.checkpoint],
        "held_out": data["held_out"],
        "prompts": data["prompts"],
        "tokenizer": made["tokenizer"],
    }
    if "chat_template" in made:
        found["chat_template"] = made["chat_template"]
    return {**found, **beside.inputs(config, manifests), **_task_files(config)}


def _task_files(config: RunConfig) -> dict[str, ArtifactRef]:
    from posttrain_lib.data.sources import digest_rows, pinned

    found = {}
    for title, task in tasks_of(config).items():
        for number, path in enumerate(task.files()):
            digest = digest_rows(pinned(path), known_digests())
            found[f"task:{title}:{number}"] = ArtifactRef(uri=path, kind="rows", digest=digest)
        for number, folder in enumerate(task.models()):
            digest = known_digests().path(Path(folder))
            found[f"judge:{title}:{number}"] = ArtifactRef(uri=folder, kind="model", digest=digest)
    return found


def tasks_of(config: RunConfig) -> dict[str, Task]:
    """The tasks of the run file by the name that they have there.

    Raises:
        ConfigError: one that cannot be imported or made.
    """
    wanted = config.evaluation.tasks
    if not wanted:
        return {}
    from posttrain_lib.evaluation.tasks import build_task

    return {one.title: build_task(one.task, one.arguments(), f"evaluation.tasks: {one.title}") for one in wanted}


def check_judges(tasks: Mapping[str, Task], tokenizer_folder: str | Path) -> None:
    """Refuse tasks' models that mean by an id something else than the evaluated one.

    Raises:
        DataError: naming the task and the token.
    """
    from posttrain_lib.data.shared_ids import check_shared_ids

    for title, task in tasks.items():
        for folder in task.models():
            check_shared_ids(tokenizer_folder, folder, where=f"evaluation.tasks: {title}")


def body(context: StepContext) -> StepResult:
    """Evaluate the starting model, then the trained weights in the same module."""
    from posttrain_lib.checkpoint.adapters import trained_weights
    from posttrain_lib.checkpoint.manager import load_model_state

    tokenizer = load_tokenizer(context.config, context.inputs)
    prompts, tasks = read_prompts(Path(context.inputs["prompts"].uri)), tasks_of(context.config)
    check_judges(tasks, context.inputs["tokenizer"].uri)
    model = load_base(context)
    context.say("evaluate: the model before training")
    before = _evaluate(context, model, tokenizer, prompts, tasks)
    state = load_model_state(context.inputs["checkpoint"].uri)
    model.load_state_dict(trained_weights(model, state, context.config.model.lora))
    context.say("evaluate: the model after training")
    after = _evaluate(context, model, tokenizer, prompts, tasks)
    earlier, later = before.held_out.losses, after.held_out.losses
    metrics: dict[str, Any] = {
        "held_out_before": earlier,
        "held_out_after": later,
        "generations": _side_by_side(context, prompts, before.texts, after.texts),
        "comparison": _comparison(context, tasks, before, after),
    }
    if context.config.evaluation.exact_match_prompts:
        metrics["exact_match"] = _exact_match(context, prompts, before.texts, after.texts)
    if context.config.reward is not None:
        metrics["calibration"] = _calibration(context, before, after)
    (context.out / "evaluation.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False), encoding="utf-8")
    write_scores(context.out / SCORES, {"before": before.results, "after": after.results})
    return StepResult(
        outputs={"evaluation": ("evaluation.json", "evaluation"), "task_scores": (SCORES, "task_scores")},
        checks=[
            Check(
                "held-out loss fell",
                later["all"] < earlier["all"],
                later["all"],
                earlier["all"],
                "loss before training",
            )
        ],
        metrics=metrics,
        summary=f"held-out loss {earlier['all']:.4f} -> {later['all']:.4f}",
    )


def _evaluate(
    context: StepContext,
    model: Decoder,
    tokenizer: ChatTokenizer,
    prompts: Sequence[dict[str, Any]],
    tasks: Mapping[str, Task],
) -> _Found:
    from posttrain_lib.data.probes import stop_ids
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.evaluation.calibration import score_pairs
    from posttrain_lib.evaluation.documents import DocumentLosses
    from posttrain_lib.evaluation.generation import greedy_generate
    from posttrain_lib.evaluation.model import load_model
    from posttrain_lib.evaluation.perplexity import held_out_loss
    from posttrain_lib.evaluation.tasks import Given
    from posttrain_lib.losses import loss_of
    from posttrain_lib.training.companions import attach_companion

    config = context.config
    loss = loss_of(config.trained)
    store = TokenStore(Path(context.inputs["held_out"].uri))
    load = partial(load_model, pad_vocabulary_to=config.model.pad_vocabulary_to)
    attach_companion(loss, beside.companion(context, in_one_process=True), {"held_out": store}, load)
    documents = DocumentLosses(store)
    how: Any = {"row_tokens": config.train.row_tokens, "precision": _precision(config)}
    held_out = held_out_loss(model, loss, store, **how, observe=documents)
    wanted = max(config.evaluation.exact_match_prompts, config.evaluation.samples)
    pairs = None
    if config.reward is not None:
        wanted = 0  # it writes nothing
        pairs = score_pairs(model, store, config.train.row_tokens)
    ids = [prompt["prompt_ids"] for prompt in prompts[:wanted]]
    completions = greedy_generate(model, ids, config.evaluation.max_new_tokens, stop_ids(tokenizer))
    texts = [tokenizer.decode(tokens) for tokens in completions]
    given = Given(store, config.train.row_tokens, prompts, config.evaluation.seed)
    results = {title: run_task(context, title, task, model, tokenizer, given) for title, task in tasks.items()}
    return _Found(held_out, documents.scores(), texts, results, pairs)


def run_task(
    context: StepContext, title: str, task: Task, model: Decoder, tokenizer: ChatTokenizer, given: Given
) -> TaskResult:
    """Run a task and say what it found."""
    result = task.run(model, tokenizer, given)
    found = (f"{name} {value.mean:.4f}" for name, value in result.metrics(given.seed).items())
    context.say(f"evaluate: {title}: {', '.join(found)}")
    return result


def _comparison(context: StepContext, tasks: Mapping[str, Task], before: _Found, after: _Found) -> list[dict[str, Any]]:
    """Held-out loss, the loss's own figures, a reward model's calibration, and the tasks' metrics, side by side."""
    from posttrain_lib.evaluation.calibration import calibration_rows
    from posttrain_lib.evaluation.comparison import compare, figure_rows

    seed = context.config.evaluation.seed
    rows = compare("held_out", {"loss": before.documents}, {"loss": after.documents}, seed)
    rows += figure_rows(before.held_out.figures, after.held_out.figures, len(after.documents.values))
    if before.pairs is not None and after.pairs is not None:
        rows += calibration_rows(before.pairs, after.pairs, seed)
    for title, task in tasks.items():
        earlier, later = before.results[title], after.results[title]
        rows += compare(title, earlier.scores, {**later.scores, **task.compare(earlier, later)}, seed)
    return rows


def _calibration(context: StepContext, before: _Found, after: _Found) -> dict[str, Any]:
    from posttrain_lib.evaluation.calibration import calibration_of

    seed, found = context.config.evaluation.seed, {"before": before.pairs, "after": after.pairs}
    return {model: calibration_of(pairs, seed) for model, pairs in found.items() if pairs is not None}


def write_scores(path: Path, results: Mapping[str, Mapping[str, TaskResult]]) -> None:
    """Each example's scores and what its task tells of it, one line each."""
    with open(path, "w", encoding="utf-8") as handle:
        for model, tasks in results.items():
            for title, result in tasks.items():
                values = {name: scores.by_itself() for name, scores in result.scores.items()}
                for number in range(max(map(len, values.values()), default=0)):
                    scores = {name: each[number] for name, each in values.items()}
                    told = result.examples[number] if result.examples else {}
                    line = {"task": title, "model": model, "example": number, "scores": scores, **told}
                    handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _exact_match(
    context: StepContext, prompts: Sequence[dict[str, Any]], before: Sequence[str], after: Sequence[str]
) -> dict[str, Any]:
    from posttrain_lib.evaluation.answers import exact_match, majority_baseline

    count = min(context.config.evaluation.exact_match_prompts, len(prompts))
    answers = [prompt["answer"] for prompt in prompts[:count]]
    majority_answer, majority = majority_baseline(answers)
    return {
        "prompts": count,
        "before": exact_match(before[:count], answers),
        "after": exact_match(after[:count], answers),
        "majority": majority,
        "majority_answer": majority_answer,
    }


def _side_by_side(
    context: StepContext, prompts: Sequence[dict[str, Any]], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    shown = min(context.config.evaluation.samples, len(before))
    return [
        {
            "prompt": str(prompts[i]["messages"][-1]["content"]),
            "expected": prompts[i]["answer"],
            "before": before[i],
            "after": after[i],
        }
        for i in range(shown)
    ]


STEP: Step = Step("evaluate", 1, "steps.evaluate", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("evaluate")
