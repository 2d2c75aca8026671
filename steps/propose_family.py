"""Step ``propose_family``: where the project has no definition of a model's architecture, an agent looks for one.

What it finds is a family file and its test, in the step's output: ready for review, never taken into the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_lib.schema.manifests import ArtifactRef, Check
from steps.base import Manifests, Step, StepContext, StepResult

if TYPE_CHECKING:
    from posttrain_lib.config.convert import ConvertConfig
    from posttrain_lib.conversion.convert import Conversion
    from posttrain_lib.conversion.protocol import Agent

#: name of the check that says whether a definition was found
FOUND = "a proposed definition passes the gate"
#: families whose files a language model is shown: the plain one, norms and caps, experts stored in another way
_EXAMPLES = ("llama", "gemma2", "gpt_oss")


def settings(config: Any) -> dict[str, Any]:
    """Who looks, for how long, and how the gate is set."""
    verification = config.model.verification.model_dump(mode="json")
    return {"conversion": config.conversion.model_dump(mode="json"), "verification": verification}


def inputs(config: Any, manifests: Manifests) -> dict[str, ArtifactRef]:
    """The model folder."""
    return {"model": manifests["inputs"].outputs["model"]}


def is_known(folder: str | Path, config: ConvertConfig) -> bool:
    """Whether the project has a definition of a folder's architecture."""
    from posttrain_lib.conversion.convert import read_config
    from posttrain_lib.models.families import FAMILIES

    family = read_config(Path(folder))["model_type"]
    return family in FAMILIES and family not in config.conversion.treat_as_unknown


def body(context: StepContext) -> StepResult:
    """Let the agent work. That it found nothing is a failed check and no error: the attempts are worth keeping."""
    from posttrain_lib.conversion.convert import convert
    from posttrain_lib.conversion.protocol import Budget
    from posttrain_lib.conversion.sandbox import Limits

    config: Any = context.config
    wanted = config.conversion
    limits = Limits(
        wanted.limits.proposal_seconds,
        wanted.limits.proposal_memory_gib,
        wanted.limits.gate_seconds,
        config.model.verification.memory_limit_gib,
    )
    found = convert(
        Path(context.inputs["model"].uri),
        agent_of(config),
        context.out,
        budget=Budget(wanted.max_attempts, wanted.max_seconds),
        limits=limits,
        tier=config.model.verification.tier,
        removed=wanted.treat_as_unknown,
        say=lambda text: context.say(f"propose_family: {text}"),
    )
    outputs: dict[str, tuple[str, str] | ArtifactRef] = {"attempts": ("attempts", "attempts")}
    outputs |= _written(found, context.out)
    return StepResult(outputs, _checks(found), _metrics(found), _summary(found))


def agent_of(config: Any) -> Agent:
    """The agent that the run file names."""
    wanted = config.conversion.agent
    if wanted.kind == "search":
        from posttrain_lib.conversion.search import SearchAgent

        return SearchAgent()
    from posttrain_lib.conversion.llm import CommandModel, EndpointModel, LLMAgent
    from posttrain_lib.models.families import FAMILIES

    known = [name for name in _EXAMPLES if name not in config.conversion.treat_as_unknown]
    examples = [FAMILIES[name].partition(":")[0] for name in known]
    if wanted.command is not None:
        return LLMAgent(CommandModel(wanted.command, wanted.timeout_seconds), families=examples, retries=wanted.retries)
    endpoint = EndpointModel(
        wanted.base_url,
        wanted.model,
        api_key_variable=wanted.api_key_variable,
        timeout_seconds=wanted.timeout_seconds,
        temperature=wanted.temperature,
        max_tokens=wanted.max_tokens,
    )
    return LLMAgent(endpoint, families=examples, retries=wanted.retries)


def _written(found: Conversion, out: Path) -> dict[str, tuple[str, str] | ArtifactRef]:
    """The family file, its test and the gate's report, under ``proposal/`` as they would lie in the project."""
    if found.file is None:
        return {}
    folder = out / "proposal"
    places = {
        "family": f"posttrain_lib/models/families/{found.model_type}.py",
        "test": f"tests/unit/models/test_{found.model_type}.py",
    }
    for name, text in (("family", found.file), ("test", found.test or "")):
        path = folder / places[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (out / "verification.json").write_text(json.dumps(found.report, indent=1), encoding="utf-8")
    return {
        "family": (f"proposal/{places['family']}", "source"),
        "test": (f"proposal/{places['test']}", "source"),
        "verification": ("verification.json", "verification"),
    }


def _checks(found: Conversion) -> list[Check]:
    attempts = len(found.outcome.attempts)
    reason = found.outcome.reason or f"{found.outcome.agent}, {attempts} attempts, {found.outcome.seconds:.0f} s"
    own = [Check(FOUND, found.file is not None, attempts, None, reason)]
    if found.file is not None and found.report is not None:
        own += [Check(**check) for check in found.report["checks"]]
    return own


def _metrics(found: Conversion) -> dict[str, Any]:
    outcome = found.outcome
    return {
        "model_type": found.model_type,
        "agent": outcome.agent,
        "seconds": outcome.seconds,
        "reason": outcome.reason,
        "attempts": [
            {
                "number": attempt.number,
                "note": attempt.note,
                "outcome": attempt.outcome,
                "summary": attempt.summary,
                "seconds": attempt.seconds,
                "isolation": list(attempt.isolation),
            }
            for attempt in outcome.attempts
        ],
    }


def _summary(found: Conversion) -> str:
    attempts, seconds = len(found.outcome.attempts), found.outcome.seconds
    if found.file is None:
        reason = found.outcome.reason
        return f"no definition of {found.model_type!r} after {attempts} attempts and {seconds:.0f} s: {reason}"
    return (
        f"a definition of {found.model_type!r} passes the gate after {attempts} attempts and {seconds:.0f} s; it waits "
        "for review and is not part of the project"
    )


STEP: Step = Step("propose_family", 1, "steps.propose_family", settings, inputs, body)
