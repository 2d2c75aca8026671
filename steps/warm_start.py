"""Step ``warm_start``: supervised fine-tuning before the first rollout, as recipe sft does it.

The chain of that recipe runs within this step, from the converted model on; its steps are in the store under their own
keys, so that another run with the same warm start takes them from there.
"""

from __future__ import annotations

from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import build_run_config
from posttrain_lib.schema.manifests import ArtifactRef
from steps.base import Manifests, Step, StepContext, StepResult, known_digests
from steps.places import local_folder
from steps.rollouts import check_answers


def is_needed(config: RunConfig) -> bool:
    """Whether the recipe has one."""
    return config.grpo is not None and config.grpo.warm_start is not None


def settings(config: RunConfig) -> dict[str, Any]:
    """Its sections, and what of the run's decides the bits."""
    assert config.grpo is not None and config.grpo.warm_start is not None
    compute = config.compute.model_dump(mode="json", include={"threads_per_worker", "device"})
    return {
        "warm_start": config.grpo.warm_start.model_dump(mode="json"),
        "compute": compute,
        "pad_vocabulary_to": config.model.pad_vocabulary_to,
    }


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The converted model, the rows that are read, and the tokenizer and the template that its data names."""
    from posttrain_lib.data.sources import digest_rows, pinned

    assert config.grpo is not None and config.grpo.warm_start is not None
    check_answers(config, manifests)
    found, data = {"model": manifests["convert_model"].outputs["model"]}, config.grpo.warm_start.data
    for name, path in (("tokenizer", data.tokenizer), ("chat_template", data.chat_template)):
        if path is not None and (local := local_folder(path, f"grpo.warm_start.data.{name}")) is not None:
            found[f"warm_start:{name}"] = ArtifactRef(uri=str(local), kind=name, digest=known_digests().path(local))
    for source in data.sources:
        if source.path is not None:
            path = pinned(source.path)
            found[f"source:{source.name}"] = ArtifactRef(
                uri=path, kind="rows", digest=digest_rows(path, known_digests())
            )
    return found


def body(context: StepContext) -> StepResult:
    """Fine-tune the model and export it.

    Raises:
        PosttrainError: whatever a step of the recipe raises.
    """
    from steps.pipeline import run_until

    config = sft_config(context.config, context.inputs["model"].uri)
    manifests = run_until("export", config, say=lambda line: context.say(f"warm_start: {line}"))
    found = manifests["evaluate"].metrics
    before, after = found["held_out_before"]["all"], found["held_out_after"]["all"]
    return StepResult(
        {"model": manifests["export"].outputs["hf"]},
        metrics={"held_out_before": before, "held_out_after": after, "export": manifests["export"].key},
        summary=f"held-out loss {before:.4f} -> {after:.4f}",
    )


def sft_config(config: RunConfig, model: str) -> RunConfig:
    """The run of recipe sft that the warm start is.

    Raises:
        ConfigError: its sections do not agree, or not with the run's devices.
    """
    assert config.grpo is not None and config.grpo.warm_start is not None
    return build_run_config(
        {
            "recipe": "sft",
            "name": f"{config.name}-warm-start",
            "data": config.grpo.warm_start.data.model_dump(mode="json"),
            "model": {"path": model, "vocabulary": {"pad_to_multiple_of": config.model.pad_vocabulary_to}},
            "train": config.grpo.warm_start.train.model_dump(mode="json"),
            "compute": config.compute.model_dump(mode="json"),
            # The run's own evaluation and export come behind the rollouts.
            "evaluation": {"exact_match_prompts": 0, "samples": 0},
            "export": {"verify_vllm": False, "checkpoint": "last"},
        },
        where="grpo.warm_start",
    )


STEP: Step = Step("warm_start", 1, "steps.warm_start", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("warm_start")
