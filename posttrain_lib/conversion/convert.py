"""From a model folder of an unknown architecture to a family file that the gate passes."""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_lib.checkpoint.hf_files import read_headers
from posttrain_lib.checkpoint.weight_files import need_local
from posttrain_lib.conversion.brief import NAMING, Scrubber, make_brief, report_for_agent
from posttrain_lib.conversion.family_file import FamilyFile, with_names
from posttrain_lib.conversion.family_test import TINY_SIZES, test_text, tiny_case
from posttrain_lib.conversion.judging import Judge, Verdict
from posttrain_lib.conversion.protocol import Agent, Attempt, Budget, Outcome, work
from posttrain_lib.conversion.sandbox import Limits, SandboxResult, run_proposal
from posttrain_lib.errors import ModelError, VerificationError
from posttrain_lib.models.families import FAMILIES

# A window longer than the gate's documents would leave no trace in them: a proposal that misses it must not pass.
_WINDOW_FIELD = re.compile(r"(^|_)window(_size)?$")
_WINDOW = 9
#: parameters up to which a folder is judged before its tiny twin
_SMALL = 1_000_000


@dataclass(frozen=True)
class Conversion:
    """What came of it. ``file`` is the family file under its real names, ready for review; None where none passed.
    ``test`` is its test file. ``report`` is the gate's on the folder itself, for people and machines."""

    model_type: str
    architecture: str
    outcome: Outcome
    file: str | None = None
    test: str | None = None
    report: dict[str, Any] | None = None


def convert(
    folder: Path,
    agent: Agent,
    out: Path,
    *,
    budget: Budget,
    limits: Limits,
    tier: str = "light",
    removed: Collection[str] = (),
    running: Judge | None = None,
    say: Callable[[str], None] = print,
) -> Conversion:
    """Let an agent find the definition of a folder's architecture.

    Args:
        folder: Hugging Face model folder, of an architecture that transformers has.
        out: every attempt goes to ``attempts`` below it.
        tier: of the gate.
        removed: families (``model_type``) that count as unknown: neither the agent nor a proposal may use them.
        running: a judge that several conversions share; default: one of its own.
        say: told of every attempt.

    Raises:
        ModelError: config.json or weights cannot be read, or the weights are not on a disk.
        VerificationError: transformers cannot load the folder.
    """
    need_local(folder, "a proposal is judged in a process that reaches no network")
    content = read_config(folder)
    model_type, architecture = str(content["model_type"]), str((content.get("architectures") or [""])[0])
    modules = {name: reference.partition(":")[0] for name, reference in FAMILIES.items()}
    hidden = {modules[name] for name in removed if name in modules}
    usable = set(modules.values()) - hidden
    scrubber = Scrubber.of(content, (str(folder), folder.name))
    headers = read_headers(folder)
    tensors = {name: entry.shape for name, entry in headers.items()}
    reports: list[dict[str, Any] | None] = []
    own = Judge(seconds=limits.gate_seconds, memory_gib=limits.gate_memory_gib, tier=tier)
    with (
        own if running is None else contextlib.nullcontext(running) as judge,
        tempfile.TemporaryDirectory(prefix="conversion-") as scratch,
    ):
        narrowed = narrow_windows(folder, content, Path(scratch) / "narrowed")
        twin = _twin(content, architecture, Path(scratch) / "twin", judge, say)
        small = sum(math.prod(shape) for shape in tensors.values()) <= _SMALL
        # The cheapest first; the folder itself has the last word.
        order = (narrowed, twin, folder) if small else (twin, narrowed, folder)
        folders = [place for place in dict.fromkeys(order) if place is not None]
        say(f"asking transformers what the {len(content)} fields of config.json do")
        brief = make_brief(content, tensors, judge.facts(folders[0]), named=agent.named, places=(folder.name,))

        def one(number: int, proposal: FamilyFile) -> Attempt:
            begin = time.monotonic()
            read, verdict = _judged(proposal.text, folders, judge, limits, usable, hidden)
            if verdict is None:
                error = None if read.error is None else scrubber.text(read.error)
                found: dict[str, Any] = {"outcome": read.outcome, "error": error}
            else:
                reports.append(verdict.report)
                report = None if verdict.report is None else report_for_agent(verdict.report, scrubber)
                error = None if verdict.error is None else scrubber.text(verdict.error)
                found = {"outcome": verdict.outcome, "error": error, "report": report}
            seconds = time.monotonic() - begin
            return Attempt(number, proposal.text, proposal.note, seconds=seconds, isolation=read.layers, **found)

        outcome = work(agent, brief, one, budget, out / "attempts", say)
    if (passing := outcome.passing) is None:
        return Conversion(model_type, architecture, outcome)
    file, test = with_names(passing.text, model_type, architecture), test_text(model_type, tiny_case(content))
    return Conversion(model_type, architecture, outcome, file, test, reports[-1])


def _twin(
    content: Mapping[str, Any], architecture: str, target: Path, judge: Judge, say: Callable[[str], None]
) -> Path | None:
    """A tiny model of the architecture with random weights; None where transformers does not take the fields that the
    sizes were cut to."""
    config = {**TINY_SIZES, **tiny_case(content), "architectures": [architecture]}
    try:
        judge.write_twin(config, target)
    except VerificationError as error:
        say(f"no tiny model of this architecture, the folder alone is judged: {error.got}")
        return None
    return target


def _judged(
    text: str, folders: list[Path], judge: Judge, limits: Limits, usable: Collection[str], hidden: Collection[str]
) -> tuple[SandboxResult, Verdict | None]:
    """A proposal on each of the folders in turn, until one does not pass."""
    verdict: Verdict | None = None
    for folder in folders:
        config = {name: value for name, value in read_config(folder).items() if name not in NAMING}
        read = run_proposal(text, config, limits=limits, families=usable, removed=hidden)
        if read.family is None:
            return read, None
        verdict = judge.verify(folder, read.family)
        if verdict.outcome != "passed":
            break
    return read, verdict


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; ModelError where there is none, or it does not say what model it is of."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError("config.json cannot be read", where=path, got=error, fix="fetch the folder again") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ModelError("config.json names no model_type", where=path, fix="fetch the folder again")
    return content


def narrow_windows(folder: Path, content: Mapping[str, Any], target: Path) -> Path:
    """The folder with sliding windows that short documents show, as links to its files; the folder itself where it has
    no wider ones."""
    wide = [name for name, value in content.items() if _WINDOW_FIELD.search(name) and type(value) is int]
    wide = [name for name in wide if content[name] > _WINDOW]
    if not wide:
        return folder
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path.resolve())
    changed = {**content, **dict.fromkeys(wide, _WINDOW)}
    (target / "config.json").write_text(json.dumps(changed, indent=2), encoding="utf-8")
    return target
