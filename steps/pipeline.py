"""The chain of steps of a recipe, and the command line that every step shares."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.config import RunConfig, load_run_config
from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import RETRY_EXIT_CODE, ConfigError, PosttrainError, PreemptedError
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.schema.manifests import StepManifest
from steps import (
    check_serving,
    convert_model,
    evaluate,
    evaluate_policy,
    export,
    inputs,
    lm_eval,
    prepare_data,
    score_data,
    train,
    warm_start,
)
from steps.base import Say, Step, run_step, say_line
from steps.start_from import RunNames, with_models_found

_LIKE_SIGPIPE = 141  # as shells report it
DEFAULT_CONFIG = PROJECT_ROOT / "configs" / "sft" / "default.yaml"

#: The steps of every recipe, each with what it needs standing before it; the last for those who ask for it.
STEPS: tuple[Step, ...] = (
    inputs.STEP,
    prepare_data.STEP,
    check_serving.STEP,
    convert_model.STEP,
    score_data.STEP,
    warm_start.STEP,
    train.STEP,
    evaluate.STEP,
    evaluate_policy.STEP,
    export.STEP,
    lm_eval.STEP,
)


def chain(config: RunConfig) -> tuple[Step, ...]:
    """The steps that a run has, by its recipe and by what it asks for."""
    not_here = {
        score_data.STEP.module: config.companion is None,
        warm_start.STEP.module: not warm_start.is_needed(config),
        evaluate.STEP.module: config.grpo is not None,
        evaluate_policy.STEP.module: config.grpo is None,
        lm_eval.STEP.module: config.evaluation.lm_eval is None,
    }
    return tuple(step for step in STEPS if not not_here.get(step.module, False))


def step_named(name: str, config: RunConfig) -> Step:
    """The step of that name that the run has.

    Raises:
        ConfigError: it has none.
    """
    found = next((step for step in chain(config) if step.name == name), None)
    if found is None:
        raise ConfigError(
            f"this run of recipe {config.recipe} has no step {name}",
            where="recipe",
            got=name,
            expected=", ".join(step.name for step in chain(config)),
        )
    return found


def run_until(
    last: str,
    config: RunConfig,
    *,
    reuse: bool = True,
    say: Say = say_line,
    observe: Callable[[Any], None] = lambda _: None,
) -> dict[str, StepManifest]:
    """Run the chain up to and including ``last``; what is in the store is reused. ``reuse=False`` redoes ``last``.

    Raises:
        ConfigError: the run has no such step.
    """
    wanted = step_named(last, config)
    manifests: dict[str, StepManifest] = {}
    for step in chain(config):
        is_last = step is wanted
        manifests[step.name] = run_step(step, config, manifests, reuse=reuse or not is_last, say=say, observe=observe)
        if is_last:
            break
    return manifests


def resolve(raw: Any, overrides: str = "", run: RunNames | None = None) -> dict[str, Any]:
    """The resolved config as plain values, after comma-separated ``key=value`` overrides (as a flow passes them), the
    models that it names found by ``run``."""
    where = "--set" if overrides.strip() else "--config"
    config = build_run_config(plain_values(raw), where=where, overrides=[overrides])
    return with_models_found(config, run=run).model_dump(mode="json")


def advance(
    name: str,
    run_config: dict[str, Any],
    manifests: Mapping[str, dict[str, Any]],
    *,
    reuse: bool,
    observe: Callable[[Any], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """One step of a flow: plain manifests in, plain manifests out, with that step's added."""
    config = RunConfig.model_validate(run_config)
    manifest = run_step(step_named(name, config), config, load_manifests(manifests), reuse=reuse, observe=observe)
    return {**manifests, name: manifest.to_dict()}


def load_manifests(manifests: Mapping[str, dict[str, Any]]) -> dict[str, StepManifest]:
    """Manifests from their plain form."""
    return {name: StepManifest.from_dict(raw) for name, raw in manifests.items()}


def show_plan(run_config: dict[str, Any], manifests: Mapping[str, dict[str, Any]]) -> None:
    """Print what the run will do (``python -m steps.plan`` prints the same without running anything)."""
    from steps.plan import describe

    say_line(describe(RunConfig.model_validate(run_config)))


def plain_values(value: Any) -> Any:
    """Metaflow hands configs out as its own mapping types."""
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return value


def main(step: str, arguments: list[str] | None = None) -> None:
    """Command line of ``python -m steps.<step>``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m steps.{step}",
        description=f"Run the step '{step}' alone; steps before it come from the store, or run if they are not there.",
        epilog="Look at single rows: python -m steps.prepare_data inspect --help" if step == "prepare_data" else None,
    )
    add_config_arguments(parser)
    parser.add_argument("--no-reuse", action="store_true", help="do this step again even if its result is in the store")
    options = parser.parse_args(arguments)
    with plain_errors():
        config = with_models_found(load_run_config(options.config, options.set))
        manifest = run_until(step, config, reuse=not options.no_reuse)[step]
        for name, ref in manifest.outputs.items():
            print(f"  {name:<14}{ref.uri}")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config`` and ``--set``, the same everywhere."""
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="run file (default: %(default)s)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="overrides, comma-separated or one at a time: train.steps=50,train.seed=1",
    )


def _nobody_reads(error: BaseException | None) -> bool:
    """Whether what is printed ends in a pipe that nobody reads any more, as behind ``| head``; what is left of it is
    dropped then, or Python would tell of it once more when it ends."""
    if sys.stdout is None:  # closed from the start: nothing is printed
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    # Unbuffered, nothing is left to flush. The error may be of another pipe, which is not to be passed over.
    return isinstance(error, BrokenPipeError) and _is_broken(sys.stdout.fileno())


def _is_broken(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class plain_errors:  # noqa: N801 - used as a statement
    """Show a :class:`PosttrainError` as its message instead of a traceback, and exit with 1; with 75 (EX_TEMPFAIL)
    where the same command goes on from a checkpoint; without a word, with 141 as of SIGPIPE, where nobody reads what is
    printed any more."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if _nobody_reads(error) and (error is None or isinstance(error, BrokenPipeError)):
            raise SystemExit(_LIKE_SIGPIPE) from None
        if isinstance(error, PosttrainError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(RETRY_EXIT_CODE if isinstance(error, PreemptedError) else 1) from None
        if isinstance(error, KeyboardInterrupt):
            print(
                "stopped by the user; finished steps are in the store, training resumes from its last checkpoint",
                file=sys.stderr,
            )
            raise SystemExit(130) from None
