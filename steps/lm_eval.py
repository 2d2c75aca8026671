"""Step ``lm_eval``: lm-evaluation-harness on the exported folder, where the run file asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.schema.manifests import ArtifactRef
from steps.base import Manifests, Step, StepContext, StepResult, known_digests


def settings(config: RunConfig) -> dict[str, Any]:
    """What is asked of it, and its version: it is not among the locked packages."""
    from importlib import metadata

    from posttrain_lib.adapters.lm_eval_process import is_available

    asked = config.evaluation.lm_eval
    return {
        "lm_eval": None if asked is None else asked.model_dump(mode="json", exclude={"timeout_minutes"}),
        "version": metadata.version("lm_eval") if is_available() else None,
    }


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The exported folder, and that of the run file's own tasks."""
    found = {"hf": manifests["export"].outputs["hf"]}
    asked = config.evaluation.lm_eval
    if asked is not None and asked.include_path is not None:
        digest = known_digests().path(Path(asked.include_path))
        found["task:lm_eval:include"] = ArtifactRef(uri=asked.include_path, kind="lm_eval_tasks", digest=digest)
    return found


def body(context: StepContext) -> StepResult:
    """Run it and keep its own results beside the rows of the report.

    Raises:
        ConfigError: it is not installed.
        VerificationError: it failed.
    """
    from posttrain_lib.adapters.lm_eval_process import comparison_rows, evaluate

    asked = context.config.evaluation.lm_eval
    assert asked is not None
    options = asked.model_dump(exclude={"timeout_minutes"})
    found = evaluate(context.inputs["hf"].uri, context.work, timeout_seconds=60 * asked.timeout_minutes, **options)
    (context.out / "lm_eval.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    rows = comparison_rows(found)
    said = ", ".join(f"{row['task']} {row['metric']} {row['after']['mean']:.4f}" for row in rows)
    return StepResult({"lm_eval": ("lm_eval.json", "lm_eval")}, metrics={"comparison": rows}, summary=said)


STEP: Step = Step("lm_eval", 1, "steps.lm_eval", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("lm_eval")
