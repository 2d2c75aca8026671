"""Step ``convert_model``: the gate. No model is trained whose logits disagree with the reference implementation."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from posttrain_lib.config import RunConfig
from posttrain_lib.errors import VerificationError
from posttrain_lib.schema.manifests import ArtifactRef
from steps.base import Manifests, Step, StepContext, StepResult


def settings(config: RunConfig) -> dict[str, Any]:
    """How the model is verified; which model it is enters by digest."""
    return config.model.verification.model_dump(mode="json")


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The model folder."""
    return {"model": manifests["inputs"].outputs["model"]}


def body(context: StepContext) -> StepResult:
    """Check the folder, load it into our definition, compare with transformers; raise on the first disagreement."""
    from posttrain_lib.checkpoint.verify import verify_model
    from posttrain_lib.checkpoint.verify_sharded import check_sharded
    from posttrain_lib.models.families import spec_from_folder

    wanted = context.config.model.verification
    limit = None if wanted.memory_limit_gib is None else int(wanted.memory_limit_gib * 2**30)
    folder = context.inputs["model"].uri
    report = verify_model(folder, tier=wanted.tier, memory_limit_bytes=limit, seed=0)
    if wanted.sharded:
        report = dataclasses.replace(report, checks=(*report.checks, *check_sharded(spec_from_folder(folder))))
    (context.out / "verification.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    for check in report.checks:
        context.say(f"convert_model: {'passed' if check.passed else 'FAILED'} {check.name} ({check.reason})")
    if not report.passed:
        failed = next(check for check in report.checks if not check.passed)
        raise VerificationError(
            f"our definition disagrees with the reference implementation: {failed.name}",
            where=f"{folder}: first wrong module {report.first_wrong_module or 'not found'}",
            got=f"{failed.value} ({failed.reason})",
            expected=f"at most {failed.limit}",
            fix=f"{report.detail or 'compare it with the transformers one'}; the model is not trained",
        )
    return StepResult(
        outputs={"model": context.inputs["model"], "verification": ("verification.json", "verification")},
        checks=list(report.checks),
        metrics=report.to_dict(),
        summary=f"{sum(check.passed for check in report.checks)} of {len(report.checks)} checks passed",
    )


STEP: Step = Step("convert_model", 1, "steps.convert_model", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("convert_model")
