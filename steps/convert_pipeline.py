"""The chain of the conversion flow: inputs -> propose_family (unknown architectures) or convert_model (known ones)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.config.convert import ConvertConfig, build_convert_config
from posttrain_lib.errors import VerificationError
from posttrain_lib.schema.manifests import StepManifest
from steps import convert_model, inputs, propose_family
from steps.base import Step, run_step
from steps.pipeline import load_manifests, plain_values
from steps.start_from import RunNames, with_models_found

STEPS: Mapping[str, Step] = {step.name: step for step in (inputs.STEP, propose_family.STEP, convert_model.STEP)}


def resolve(raw: Any, model: str, overrides: str, run: RunNames | None = None) -> dict[str, Any]:
    """The resolved config as plain values; ``model`` replaces the run file's where given, and may be a name that
    ``run`` looks up."""
    plain = plain_values(raw)
    if model:
        plain["model"] = {**plain["model"], "path": model, "from_scratch": None}
    where = "--set" if overrides.strip() else "--config"
    config = build_convert_config(plain, where=where, overrides=[overrides])
    return with_models_found(config, run=run).model_dump(mode="json")


def advance(
    name: str, run_config: dict[str, Any], manifests: Mapping[str, dict[str, Any]], *, reuse: bool
) -> dict[str, dict[str, Any]]:
    """One step of the flow: plain manifests in, plain manifests out, with that step's added.

    ``propose_family`` is for architectures that the project does not have, ``convert_model`` for the others: each
    leaves the manifests as they are where it has nothing to do.
    """
    config, before = ConvertConfig.model_validate(run_config), load_manifests(manifests)
    if name != "inputs":
        known = propose_family.is_known(before["inputs"].outputs["model"].uri, config)
        if known == (name == "propose_family"):
            return dict(manifests)
    manifest = run_step(STEPS[name], config, before, reuse=reuse)  # type: ignore[arg-type]
    return {**manifests, name: manifest.to_dict()}


def summarise(run_config: dict[str, Any], manifests: Mapping[str, StepManifest]) -> dict[str, Any]:
    """What came of it, as plain values (an artifact of the flow's last step)."""
    last = manifests.get("convert_model") or manifests["propose_family"]
    return {
        "name": run_config["name"],
        "known": "convert_model" in manifests,
        "model": manifests["inputs"].outputs["model"].uri,
        "passed": all(check.passed for check in last.checks),
        "outputs": {name: ref.uri for name, ref in last.outputs.items()},
    }


def check(summary: Mapping[str, Any], manifests: Mapping[str, StepManifest]) -> None:
    """Print what came of it.

    Raises:
        VerificationError: no definition was found; the attempts stay in the store.
    """
    for name, uri in summary["outputs"].items():
        print(f"{name:<14}{uri}")
    if summary["passed"]:
        return
    found = manifests["propose_family"].metrics
    raise VerificationError(
        "no definition of the architecture was found",
        where=f"{summary['model']}: model_type {found['model_type']!r}",
        got=f"{len(found['attempts'])} attempts by {found['agent']}: {found['reason']}",
        fix=f"read the attempts in {summary['outputs']['attempts']}, give the agent more, or write the family file",
    )
