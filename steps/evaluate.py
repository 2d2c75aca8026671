"""Step ``evaluate``: held-out loss per source, exact match and greedy samples, before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.schema.manifests import ArtifactRef, Check
from steps.base import Manifests, Step, StepContext, StepResult

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.models.decoder import Decoder


def settings(config: RunConfig) -> dict[str, Any]:
    """The evaluation section without its gates, the loss, which checkpoint is looked at, and how it is padded."""
    return {
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"gates"}),
        "loss": [config.train.loss, config.train.loss_options],
        "row_tokens": config.train.row_tokens,
        "checkpoint": config.export.checkpoint,
        "pad_vocabulary_to": config.model.pad_vocabulary_to,
        **config.model.model_dump(mode="json", include={"lora", "backend"}),
        "template": [config.data.template_date, config.data.template_kwargs],
    }


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The model before and after, the held-out tokens and prompts, the tokenizer."""
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
    return found


def body(context: StepContext) -> StepResult:
    """Evaluate the starting model, then the trained weights in the same module."""
    from posttrain_lib.checkpoint.adapters import trained_weights
    from posttrain_lib.checkpoint.manager import load_model_state

    tokenizer = load_tokenizer(context.config, context.inputs)
    prompts = read_prompts(Path(context.inputs["prompts"].uri))
    model = load_base(context)
    context.say("evaluate: the model before training")
    before = _evaluate(context, model, tokenizer, prompts)
    state = load_model_state(context.inputs["checkpoint"].uri)
    model.load_state_dict(trained_weights(model, state, context.config.model.lora))
    context.say("evaluate: the model after training")
    after = _evaluate(context, model, tokenizer, prompts)
    metrics: dict[str, Any] = {
        "held_out_before": before["held_out"],
        "held_out_after": after["held_out"],
        "generations": _side_by_side(context, prompts, before["texts"], after["texts"]),
    }
    if context.config.evaluation.exact_match_prompts:
        metrics["exact_match"] = _exact_match(context, prompts, before["texts"], after["texts"])
    (context.out / "evaluation.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False), encoding="utf-8")
    improved = after["held_out"]["all"] < before["held_out"]["all"]
    return StepResult(
        outputs={"evaluation": ("evaluation.json", "evaluation")},
        checks=[
            Check(
                "held-out loss fell",
                improved,
                after["held_out"]["all"],
                before["held_out"]["all"],
                "loss before training",
            )
        ],
        metrics=metrics,
        summary=f"held-out loss {before['held_out']['all']:.4f} -> {after['held_out']['all']:.4f}",
    )


def load_base(context: StepContext) -> Decoder:
    """The model that was trained, as it was before."""
    from posttrain_lib.evaluation.model import load_model

    wanted = context.config.model
    folder = context.inputs["model"].uri
    return load_model(folder, pad_vocabulary_to=wanted.pad_vocabulary_to, backend=wanted.backend)


def load_tokenizer(config: RunConfig, found: dict[str, ArtifactRef]) -> ChatTokenizer:
    """The run's tokenizer with the run's template and date."""
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

    return ChatTokenizer(
        found["tokenizer"].uri,
        chat_template=found["chat_template"].uri if "chat_template" in found else None,
        template_date=config.data.template_date,
        template_kwargs=config.data.template_kwargs,
    )


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The held-out prompts that the data step wrote, in their order."""
    with open(path, encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def _evaluate(
    context: StepContext, model: Decoder, tokenizer: ChatTokenizer, prompts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    from posttrain_lib.data.probes import stop_ids
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.evaluation.generation import greedy_generate
    from posttrain_lib.evaluation.perplexity import held_out_loss
    from posttrain_lib.losses import build_loss

    config = context.config
    loss = build_loss(config.train.loss, config.train.loss_options)
    store = TokenStore(Path(context.inputs["held_out"].uri))
    held_out = held_out_loss(model, loss, store, row_tokens=config.train.row_tokens).losses
    wanted = max(config.evaluation.exact_match_prompts, config.evaluation.samples)
    ids = [prompt["prompt_ids"] for prompt in prompts[:wanted]]
    completions = greedy_generate(model, ids, config.evaluation.max_new_tokens, stop_ids(tokenizer))
    return {"held_out": held_out, "texts": [tokenizer.decode(tokens) for tokens in completions]}


def _exact_match(
    context: StepContext, prompts: Sequence[dict[str, Any]], before: Sequence[str], after: Sequence[str]
) -> dict[str, Any]:
    from posttrain_lib.evaluation.tasks import exact_match, majority_baseline

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
    shown = min(context.config.evaluation.samples, len(prompts))
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
