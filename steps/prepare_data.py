"""Step ``prepare_data``: rows become token ids with loss weights, split, checked and counted."""

from __future__ import annotations

from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.errors import DataError
from posttrain_lib.schema.manifests import ArtifactRef
from steps.base import Manifests, Step, StepContext, StepResult, known_digests


def settings(config: RunConfig) -> dict[str, Any]:
    """The data section, without where the rows lie: their content is an input."""
    elsewhere = {"tokenizer", "chat_template", "serving_check", "serving_accepts", "serving_samples"}
    section = config.data.model_dump(mode="json", exclude={*elsewhere, "template_date", "template_kwargs", "workers"})
    section["template"] = config.data.template_variables
    section["sources"] = [source.model_dump(include={"name", "format", "fields"}) for source in config.data.sources]
    return section


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The rows, the tokenizer folder and, if one replaces the tokenizer's own, the template."""
    made = manifests["inputs"].outputs
    wanted = ("tokenizer", "chat_template")
    return {name: ref for name, ref in made.items() if name.startswith("source:") or name in wanted}


def body(context: StepContext) -> StepResult:
    """Render, mask by two methods, split and write the token stores; fail closed."""
    from posttrain_lib.data.prepare import prepare_dataset

    found = context.inputs
    config = context.config.data
    check_unchanged(context)
    if "chat_template" in found:
        config = config.model_copy(update={"chat_template": found["chat_template"].uri})
    receipt = prepare_dataset(
        config,
        tokenizer_folder=found["tokenizer"].uri,
        inputs={source.name: found[f"source:{source.name}"].uri for source in config.sources},
        out_dir=context.out,
        rejects_dir=context.work,
        progress=context.say,
    )
    check_unchanged(context)  # again: reading took time
    for check in receipt.checks():
        if not check.passed:
            context.say(f"prepare_data: FAILED {check.name}: {check.value} ({check.reason})")
    return StepResult(
        outputs={
            "train": ("train", "tokens"),
            "held_out": ("held_out", "tokens"),
            "prompts": ("prompts.jsonl", "prompts"),
            "train_prompts": ("train_prompts.jsonl", "prompts"),
            "receipt": ("receipt.json", "receipt"),
            "samples": ("samples.json", "samples"),
            "quarantine": ("quarantine.jsonl", "quarantine"),
        },
        checks=receipt.checks(),
        metrics=receipt.to_dict(),
        summary=receipt.summary(),
    )


def check_unchanged(context: StepContext) -> None:
    """The rows are those that the run's key was made of; a resumed run may find them edited.

    Raises:
        DataError: naming the source.
    """
    from posttrain_lib.data.sources import digest_rows

    known = known_digests()
    for source in context.config.data.sources:
        wanted = context.inputs[f"source:{source.name}"]
        if source.path is not None and digest_rows(wanted.uri, known) != wanted.digest:
            raise DataError(
                "the data is not what it was when the run started",
                where=f"source {source.name}: {wanted.uri}",
                expected=f"content {wanted.digest[:12]}",
                fix="start a new run (or `resume start`), so that the results are kept under the new content",
            )


STEP: Step = Step("prepare_data", 1, "steps.prepare_data", settings, inputs, body)

if __name__ == "__main__":
    import sys

    from steps import inspect_data
    from steps.pipeline import main

    if sys.argv[1:2] == ["inspect"]:
        inspect_data.main(sys.argv[2:])
    else:
        main("prepare_data")
