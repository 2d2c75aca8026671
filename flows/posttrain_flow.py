"""What every flow shares. Import it before ``metaflow``: Metaflow reads its environment once, when imported."""

import contextlib
import getpass
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

try:
    from posttrain_lib.config.load import parse_run_config
    from posttrain_lib.errors import RETRY_EXIT_CODE, ConfigError, PosttrainError, PreemptedError
    from posttrain_lib.schema.manifests import MadeBy
    from steps.base import results_of
    from steps.start_from import RunNames
except ModuleNotFoundError as error:
    print(
        f"{error}\nThe project's environment is not active. Run the same command through it:\n"
        f"  {ROOT / 'infra' / 'env'} python {' '.join(sys.argv)}",
        file=sys.stderr,
    )
    raise SystemExit(1) from None

DEFAULT_CONFIG = {
    recipe: ROOT / "configs" / recipe / "default.yaml" for recipe in ("sft", "dpo", "reward", "distill", "grpo")
}

#: Metaflow's exit code for "failed, and a retry would fail the same way"
_DO_NOT_RETRY = 202


def _set_defaults() -> None:
    """Defaults that a user's own environment overrides."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "root"  # no name for this uid, as in many containers; Metaflow refuses to guess
    defaults = {
        "METAFLOW_USER": "posttrain" if user == "root" else user,  # Metaflow refuses root
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(ROOT),  # else a stray .metaflow in a parent folder would catch the runs
        "METAFLOW_FEAT_ALWAYS_UPLOAD_CODE_PACKAGE": "1",  # local runs record their code too
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Cards would else be kept, and looked for, below whatever folder a command is run in.
    sysroot = os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"]
    os.environ.setdefault("METAFLOW_CARD_LOCALROOT", str(Path(sysroot) / ".metaflow" / "mf.cards"))


_set_defaults()


def plain_options(arguments: list[str]) -> list[str]:
    """``--config FILE`` anywhere becomes what Metaflow wants: ``--config config FILE``, before the command.

    Metaflow names its configs, and a flow here has one; its own spelling is left as it is. Several ``--set`` become
    one, for Metaflow would take the last alone.
    """
    option, rest = [], []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument.startswith("--config="):
            option += ["--config", "config", argument.removeprefix("--config=")]
        elif argument == "--config" and pending[:1] == ["config"] and len(pending) > 1:
            option += [argument, pending.pop(0), pending.pop(0)]
        elif argument == "--config" and pending:
            option += [argument, "config", pending.pop(0)]
        elif argument.startswith("--set="):
            pending[:0] = ["--set", argument.removeprefix("--set=")]
        elif argument == "--set" and pending and "--set" in rest:
            rest[rest.index("--set") + 1] += f",{pending.pop(0)}"
        else:
            rest.append(argument)
    return option + rest


sys.argv[1:] = plain_options(sys.argv[1:])


def parser_of(parse: Callable[..., Any]) -> Callable[[str], dict[str, Any]]:
    """Parser of a flow's ``--config``: strict, and complete with every default, so that the run stores it whole.

    ``parse``: makes a recipe's config of a text, as ``parse_run_config`` does.
    """

    def parse_config(text: str) -> dict[str, Any]:
        try:
            return parse(text, where="--config").model_dump(mode="json")
        except ConfigError as error:
            from metaflow.exception import MetaflowException

            raise MetaflowException(str(error)) from None

    return parse_config


parse_config = parser_of(parse_run_config)


def this_run() -> RunNames:
    """For looking up models by name: the run whose task this is. A retry of the task keeps what its first attempt
    found, a resumed run what the run found that it resumes."""
    from metaflow import current

    from posttrain_lib.adapters.metaflow_runs import resumed_runs

    name, again = current.flow_name, [current.run_id] if current.retry_count else []
    keeps = [*again, *resumed_runs(name, current.origin_run_id)]
    return RunNames(f"{name}/{current.run_id}", tuple(f"{name}/{run}" for run in keeps))


def _this_task() -> MadeBy:
    from metaflow import current

    origin = current.origin_run_id
    return MadeBy(current.flow_name, current.run_id, current.step_name, current.username, origin)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Around the body of every step: results made inside name this task as what made them, what a user can act on is
    printed without a traceback, and Metaflow is told whether a retry would help. It goes on behind a stop that was
    asked for, and would fail the same way behind anything else."""
    try:
        with results_of(_this_task()):
            yield
    except PreemptedError as stop:
        print(f"{type(stop).__name__}: {stop}", file=sys.stderr, flush=True)
        raise SystemExit(RETRY_EXIT_CODE) from None
    except PosttrainError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(_DO_NOT_RETRY) from None
