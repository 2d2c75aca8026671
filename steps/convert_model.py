"""Step ``convert_model``: the gate. No model is trained whose logits disagree with the reference implementation."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from posttrain_lib.config import RunConfig
from posttrain_lib.config.model import ModelConfig
from posttrain_lib.errors import VerificationError
from posttrain_lib.models.hf_spec import marks
from posttrain_lib.schema.manifests import ArtifactRef
from steps.base import Manifests, Step, StepContext, StepResult
from steps.checks import outcome

if TYPE_CHECKING:
    from posttrain_lib.checkpoint.verify_report import VerificationReport


_DISAGREES = {
    "native": "our definition disagrees with the reference implementation",
    "hf": "transformers' class cannot be trained as a decoder",
}


def settings(config: RunConfig) -> dict[str, Any]:
    """How the model is verified, and as what; which model it is enters by digest."""
    return {"backend": config.model.backend, **config.model.verification.model_dump(mode="json")}


def inputs(config: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The model folder, and that of a frozen model of its own beside it."""
    made = manifests["inputs"].outputs
    return {name: made[name] for name in ("model", "companion") if name in made}


def body(context: StepContext) -> StepResult:
    """Check the folder, load it into our definition, compare with transformers; raise on the first disagreement. Of
    transformers' own class that is proven which can be."""
    folder, backend = context.inputs["model"].uri, context.config.model.backend
    report, unproven = _verify(folder, context.config.model)
    found = {**report.to_dict(), **marks(backend), "not_applicable": list(unproven)}
    (context.out / "verification.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    for check in report.checks:
        context.say(f"convert_model: {outcome(check, reason=True)}")
    for name in unproven:
        context.say(f"convert_model: not applicable, backend {backend}: {name}")
    if not report.passed:
        raise _refusal(report, backend)
    if "companion" in context.inputs:
        _verify_companion(context)
    return StepResult(
        outputs={"model": context.inputs["model"], "verification": ("verification.json", "verification")},
        checks=list(report.checks),
        metrics=found,
        summary=f"{sum(check.passed for check in report.checks)} of {len(report.checks)} checks passed",
    )


def _verify_companion(context: StepContext) -> None:
    """A reference or a teacher passes the same gate: what it says decides what is learned."""
    folder = context.inputs["companion"].uri
    own = context.config.model.model_copy(update={"backend": "native"})
    report, _ = _verify(folder, own)
    passed = sum(check.passed for check in report.checks)
    context.say(f"convert_model: the frozen model {folder}: {passed} of {len(report.checks)} checks passed")
    if not report.passed:
        raise _refusal(report, "native")


def _refusal(report: VerificationReport, backend: str) -> VerificationError:
    """What stops the run: the first disagreement, unless the weights are such that nothing can be compared with."""
    from posttrain_lib.checkpoint.verify_gradients import REFERENCE

    failed = [check for check in report.checks if not check.passed]
    unusable = next((check for check in failed if check.name == REFERENCE), None)
    if unusable is not None:
        return VerificationError(
            f"the reference itself is not numerically usable with these weights: {unusable.reason}",
            where=report.folder,
            got=unusable.value,
            expected=f"at most {unusable.limit}",
            fix="look at how the weights were made or changed (scale, all zeros, dtype); the model is not trained",
        )
    return VerificationError(
        f"{_DISAGREES[backend]}: {failed[0].name}",
        where=f"{report.folder}: first wrong module {report.first_wrong_module or 'not found'}",
        got=f"{failed[0].value} ({failed[0].reason})",
        expected=f"at most {failed[0].limit}",
        fix=f"{report.detail or 'compare it with the transformers one'}; the model is not trained",
    )


def _verify(folder: str, model: ModelConfig) -> tuple[VerificationReport, tuple[str, ...]]:
    """The report, and what of the gate the model's backend has no place for."""
    from posttrain_lib.checkpoint.hf_backend import NOT_APPLICABLE, verify_hf_model
    from posttrain_lib.checkpoint.verify import verify_model
    from posttrain_lib.checkpoint.verify_score import verify_score_model
    from posttrain_lib.checkpoint.verify_sharded import check_sharded
    from posttrain_lib.models.families import spec_from_folder

    wanted = model.verification
    limit = None if wanted.memory_limit_gib is None else int(wanted.memory_limit_gib * 2**30)
    if model.backend == "hf":
        return verify_hf_model(folder, memory_limit_bytes=limit, seed=0), NOT_APPLICABLE
    spec = spec_from_folder(folder)
    verify = verify_score_model if spec.config.score_head else verify_model
    report = verify(folder, tier=wanted.tier, memory_limit_bytes=limit, seed=0)
    if wanted.sharded:
        report = dataclasses.replace(report, checks=(*report.checks, *check_sharded(spec)))
    return report, ()


STEP: Step = Step("convert_model", 1, "steps.convert_model", settings, inputs, body)

if __name__ == "__main__":
    from steps.pipeline import main

    main("convert_model")
