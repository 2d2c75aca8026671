"""A run done again from its lineage alone: its config, its inputs by digest, its code, its environment.

    plan = begin("SFTFlow/1795696944952819", "1", moved="", code="recorded", environment="recorded")
    found = report(plan, carry_out(plan))

The recorded code's own flow runs it, with a store and Metaflow records that are its own: nothing is reused, and no name
such as ``SFTFlow/latest`` comes to mean it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from posttrain_lib.errors import ConfigError, StoreError, VerificationError
from posttrain_lib.lineage.digests import digest_file
from posttrain_lib.lineage.environment import describe_code, environment_digest
from posttrain_lib.lineage.kept import RECORDS, keep, sources_of
from posttrain_lib.lineage.recorded_code import check_out, differing_files, has_commit
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.lineage.store import STORE_VARIABLE, Entry, Store
from posttrain_lib.schema.manifests import StepManifest
from steps.base import Say, say_line
from steps.recorded import Recorded, recorded_run
from steps.reproduce_inputs import check_inputs, parse_moved, with_inputs
from steps.reproduced import as_text, compare, first_difference, verdict
from steps.start_from import FLOWS

#: as recorded, or as it is here
Which = Literal["recorded", "here"]
_TOLD_LINES = 15
#: what a run that is asked to stop gets to write its checkpoint and to end
_GRACE_SECONDS = 30.0
_TELL = (
    "import json, sys; from steps.recorded import recorded_run; found = recorded_run(sys.argv[1]);"
    "print(json.dumps({step: each.to_dict() for step, each in found.manifests.items()}))"
)


@dataclass(frozen=True)
class Plan:
    """How a run will be done again.

    Attributes:
        config: the run file, every input in its place.
        root: of the code that will run.
        code: which code that is, in words.
        lacks: what of code and environment is known to be another than recorded, in words.
        python: the command that starts Python in its environment.
        accelerator: which lock ``infra/env`` takes; None where it is not asked.
        seconds: what it took to look at the inputs and to have code and environment ready.
    """

    recorded: Recorded
    folder: Path
    config: dict[str, Any]
    root: Path
    code: str
    lacks: tuple[str, ...]
    python: tuple[str, ...]
    accelerator: str | None
    seconds: float


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    Attributes:
        manifests: of the steps that went through, by name.
        run: its name, in the records below the plan's folder; empty where it did not begin.
        seconds: wall time of the whole run.
        stopped: the last lines of a run that did not go through to its end; None of one that did.
    """

    run: str
    manifests: dict[str, StepManifest]
    seconds: float
    stopped: str | None


def begin(origin: str, run: str, *, moved: str, code: str, environment: str, say: Say = say_line) -> Plan:
    """The plan for a run by its name, told. ``run``: the id of the one that does it again.

    Raises:
        ConfigError: no such run; and as :func:`make_plan`.
    """
    store = Store()
    recorded = recorded_run(origin, store=store, where="--origin")
    # Among what the clean-up takes away when nobody works there.
    folder = store.root / "tmp" / f"reproduced-{recorded.flow}-{recorded.run}-{run}"
    with store.lock("tmp", folder.name):
        plan = make_plan(
            recorded,
            folder,
            moved=moved,
            code=_which("--code", code),
            environment=_which("--environment", environment),
            store=store,
        )
    say(f"{recorded.name} ({recorded.state}), {_took(recorded.manifests):.0f} s in its steps")
    for name, value in _facts(plan).items():
        say(f"  {name:<12}{value}")
    return plan


def _which(option: str, value: str) -> Which:
    if value in get_args(Which):
        return cast(Which, value)
    raise ConfigError("this is neither of two words", where=option, got=value, expected="recorded or here")


def make_plan(
    recorded: Recorded,
    folder: Path,
    *,
    moved: str = "",
    code: Which = "recorded",
    environment: Which = "recorded",
    store: Store | None = None,
) -> Plan:
    """Look at everything that the run needs, and have its code and environment ready below ``folder``.

    Args:
        moved: ``name=path`` of inputs that lie elsewhere by now, comma-separated.
        code, environment: ``here`` takes this checkout's, or the running environment, whatever was recorded.

    Raises:
        ConfigError: an input is gone or was changed; the code or the environment cannot be had again.
    """
    store, places, started = store or Store(), parse_moved(moved, recorded), time.monotonic()
    check_inputs(recorded, places)
    config = with_inputs(recorded, places)
    lock = recorded.environment["lock"]
    same_lock = environment == "here" or lock == environment_digest()
    root, words = _code(recorded, folder / "code", store, code, same_lock)
    changed = _differing(recorded, root, store)
    lacks = [f"code: {', '.join(changed)}"] if changed else []
    if environment == "here" and lock != environment_digest():
        lacks.append(f"environment: lock {environment_digest()[:12]} instead of {lock[:12]}")
    python, accelerator = ((sys.executable,), None) if same_lock else _made_environment(lock, root)
    seconds = time.monotonic() - started
    return Plan(recorded, folder, config, root, words, tuple(lacks), python, accelerator, seconds)


def _differing(recorded: Recorded, root: Path, store: Store) -> list[str]:
    """Source files that some step of the run reached and that are others below ``root``."""
    found: list[str] = []
    for step, manifest in recorded.manifests.items():
        files = sources_of(store, manifest.key_parts["source"])
        found += [f"the sources of {step}, whose list is not kept"] if files is None else differing_files(files, root)
    return list(dict.fromkeys(found))


def _code(recorded: Recorded, folder: Path, store: Store, which: Which, same_lock: bool) -> tuple[Path, str]:
    """The root of the code to run, and what it is. A checkout is never given another lock's environment."""
    code, here = recorded.code, describe_code()
    clean = {"commit": code.commit, "uncommitted_changes": "no"} == here and code.patch is None and not code.lacks
    if which == "here" or (same_lock and (clean or not _differing(recorded, PROJECT_ROOT, store))):
        return PROJECT_ROOT, f"this checkout, commit {here.get('commit', 'not known')[:12]}"
    whole = code.patch_file is not None or not code.lacks  # what a patch left out is data, most likely
    if code.commit is not None and whole and has_commit(code.commit):
        patch = "" if code.patch is None else f" with patch {code.patch[:12]}"
        return check_out(code.commit, code.patch_file, folder), f"commit {code.commit[:12]}{patch}"
    from posttrain_lib.adapters.metaflow_code import unpack_code

    if unpack_code(recorded.flow, recorded.run, folder):
        return folder, "Metaflow's package of the run's code"
    raise ConfigError(
        "the run's code cannot be had again",
        where=recorded.name,
        got=f"commit {code.commit or 'not known'}, which git does not have here; {code.lacks or 'nothing else lacks'}; "
        "and Metaflow kept no package",
        fix="git fetch the commit; or --code here runs this checkout's, and the comparison says what differs",
    )


def _made_environment(lock: str, root: Path) -> tuple[tuple[str, ...], str]:
    """The command for Python in the recorded environment, made anew from the recorded lock.

    Raises:
        ConfigError: the recorded code has no such lock, or it does not resolve any more.
    """
    if root == PROJECT_ROOT:
        raise ConfigError(
            "this checkout keeps its own environment, and the run had another",
            where="--code here",
            got=f"lock {lock[:12]} was recorded, this environment's is {environment_digest()[:12]}",
            fix="add --environment here; or leave --code at recorded: its environment is then made beside it",
        )
    files = [path for path in sorted((root / "infra" / "locks").glob("*.txt")) if digest_file(path) == lock]
    instead = "--environment here runs it in this environment, and the comparison says what differs"
    if not files:
        raise ConfigError(
            "the run's environment cannot be made: its lock is not in its code",
            where=root / "infra" / "locks",
            got=f"lock {lock[:12]} was recorded, this environment's is {environment_digest()[:12]}",
            fix=instead,
        )
    command = str(root / "infra" / "env")
    variables = {**os.environ, "POSTTRAIN_ACCELERATOR": files[0].stem}
    done = subprocess.run([command, "true"], env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(
            "the run's lock does not resolve any more",
            where=files[0],
            got=_last(done.stderr.splitlines()),
            fix=f"name an index that has its packages (PIP_INDEX_URL); or {instead}",
        )
    return (command, "python"), files[0].stem


def carry_out(plan: Plan, *, store: Store | None = None, say: Say = say_line) -> Reproduction:
    """Run the flow; whatever becomes of it, the steps that went through are told."""
    from posttrain_lib.adapters.metaflow_runs import flow_file

    store = store or Store()
    plan.folder.mkdir(parents=True, exist_ok=True)
    config, run_id = plan.folder / "config.json", plan.folder / "run-id"
    config.write_text(json.dumps(plan.config, indent=1), encoding="utf-8")
    flow = flow_of(plan.recorded)
    program = str(plan.root / "flows" / flow_file(flow))
    options = ["--no-pylint", "--config", str(config), "run", "--run-id-file", str(run_id)]
    started = time.monotonic()
    with store.lock("tmp", plan.folder.name):  # the clean-up leaves it alone
        status, lines = _watched([*plan.python, program, *options], _variables(plan), say)
    seconds, stopped = time.monotonic() - started, None if status == 0 else _last(lines)
    name = f"{flow}/{run_id.read_text(encoding='utf-8').strip()}" if run_id.is_file() else ""
    for record in sorted((plan.folder / "store" / RECORDS).glob("*.*")):
        keep(store, record.read_bytes(), record.suffix[1:])  # so that the comparison can name files and packages
    return Reproduction(name, _told(plan, name) if name else {}, seconds, stopped)


def flow_of(recorded: Recorded) -> str:
    """The flow that does the run's steps: its recipe's, also where they were a part of a retrain; else its own."""
    from posttrain_lib.adapters.metaflow_runs import flow_file

    recipe = recorded.config.get("recipe")
    return next((flow for flow in FLOWS if flow_file(flow) == f"{recipe}_flow.py"), recorded.flow)


def _watched(command: list[str], variables: dict[str, str], say: Say) -> tuple[int, list[str]]:
    """Exit status and lines of a command, whose processes end where this one is stopped."""
    lines = []
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                say(f"  {lines[-1]}")
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, lines


def _variables(plan: Plan) -> dict[str, str]:
    """This process's own but Metaflow's of the task that it may be; records and store of its own."""
    not_kept = ("METAFLOW_", "MF_")
    kept = {
        name: value for name, value in os.environ.items() if name == "METAFLOW_USER" or not name.startswith(not_kept)
    }
    path = [str(plan.root), str(plan.root / "flows"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(plan.folder),
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DEFAULT_METADATA": "local",
        STORE_VARIABLE: str(plan.folder / "store"),
        "PYTHONPATH": os.pathsep.join(path),
        **({} if plan.accelerator is None else {"POSTTRAIN_ACCELERATOR": plan.accelerator}),
    }


def _told(plan: Plan, name: str) -> dict[str, StepManifest]:
    """The manifests of the reproduction; its records are not those that this process reads."""
    variables = {**_variables(plan), "PYTHONPATH": os.pathsep.join([str(PROJECT_ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", _TELL, name], env=variables, capture_output=True, text=True, check=False
    )
    if "no step of the run left a result" in done.stderr:
        return {}  # the comparison says of the first that it was not reached, and why
    if done.returncode != 0:
        raise StoreError("what was made cannot be read", where=plan.folder, got=_last(done.stderr.splitlines()))
    told = json.loads(done.stdout.splitlines()[-1])
    return {step: StepManifest.from_dict(raw) for step, raw in told.items()}


def _last(lines: list[str]) -> str:
    return "\n".join(lines[-_TOLD_LINES:])


def report(plan: Plan, made: Reproduction, *, store: Store | None = None, say: Say = say_line) -> dict[str, Any]:
    """The comparison in plain values: origin, verdict, reproduced, facts, steps, folder; also told."""
    recorded = plan.recorded
    precision = recorded.config.get("train", {}).get("precision")
    steps = compare(recorded.manifests, made.manifests, store or Store(), precision=precision, stopped=made.stopped)
    now, then = _took(made.manifests), _took(recorded.manifests)
    facts = {
        **_facts(plan),
        "time": f"{plan.seconds:.0f} s to prepare, {made.seconds:.0f} s to run: {now:.1f} s in the steps, which took "
        f"{then:.1f} s then",
    }
    say(as_text(steps))
    say(f"{facts['time']}\n{verdict(steps)}")
    return {
        "origin": recorded.name,
        "verdict": verdict(steps),
        "reproduced": first_difference(steps) is None,
        "facts": facts,
        "steps": [dataclasses.asdict(step) for step in steps],
        "seconds": {"preparing": plan.seconds, "running": made.seconds, "steps": now, "steps then": then},
        "folder": str(plan.folder),
    }


def clear_away(plan: Plan, report: dict[str, Any], *, keep: bool, store: Store | None = None) -> None:
    """Remove what was made, where it is what there was already."""
    if report["reproduced"] and not keep:
        # However young: it is the run's own, and the lock says whether anybody works there.
        (store or Store()).remove(Entry("tmp", "-", plan.folder.name, plan.folder, 0, math.inf))


def check(report: dict[str, Any], say: Say = say_line) -> None:
    """Say the verdict.

    Raises:
        VerificationError: the run does not reproduce.
    """
    say(report["verdict"])
    if report["reproduced"]:
        return
    first = next(step for step in report["steps"] if step["verdict"] in ("differs", "not reached"))
    raise VerificationError(
        "the run does not reproduce",
        where=f"{report['origin']}, step {first['name']}: the first that differs",
        got=first["what"],
        expected="the recorded results",
        fix="\n            ".join(
            ["what could have caused it:", *first["causes"], f"what was made is kept in {report['folder']}"]
        ),
    )


def _facts(plan: Plan) -> dict[str, str]:
    lock = plan.recorded.environment["lock"][:12]
    inputs = ", ".join(f"{name} {ref.digest[:12]}" for name, ref in plan.recorded.inputs.items())
    return {
        "code": plan.code,
        "environment": "this one" if plan.accelerator is None else f"made anew from lock {lock}",
        "inputs": inputs or "none from outside: all is generated",
        "otherwise": "; ".join(plan.lacks) or "nothing known",
    }


def _took(manifests: Mapping[str, StepManifest]) -> float:
    return sum(manifest.seconds for manifest in manifests.values())
