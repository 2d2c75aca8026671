"""Whether a run that was done again came out as before: step by step, the first that differs, and what may be why.

Data must be the same bits always. What is computed must be, where hardware, environment and code are the same;
otherwise it may differ by rounding. How much a logit of the run's own model moves by rounding was measured and recorded
by the gate (``convert_model``). A loss is a mean of differences of two logits, and each update adds such a rounding: so
a loss may be ``2 * limit * (1 + updates)`` off, and never by more than a hundredth of itself, for in half precision the
first would soon allow anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain_lib.lineage.kept import packages_of, sources_of
from posttrain_lib.lineage.store import Store, first_damage, published_place
from posttrain_lib.lineage.tree import SHORT
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps.unfinished import changes, differences, told

Manifests = Mapping[str, StepManifest]
Verdict = Literal["equal", "within noise", "differs", "not reached"]

#: steps that compute nothing: their results are the same bits wherever they run
_DATA = ("inputs", "prepare_data", "check_serving")
#: what of a training step's report a clock or the machine's memory says
_MEASURED = re.compile(r"\w*seconds|mfu\w*|hfu|peak_memory_gib|memory_gib|(?:time|idle)/.*")
#: share of a loss that rounding never moves it by
_MOST = 0.01
#: the recorded rounding of logits in a training precision: the check of the gate that measured it
_ROUNDING = {"fp32": "logits, float32", "bf16": "logits, bfloat16, mean"}


@dataclass(frozen=True)
class Step:
    """One step of both runs.

    Attributes:
        what: of the results, what is compared and how it came out.
        largest: the largest difference of a loss, in nats; None where no loss was compared.
        causes: what differs of what went in; one word where nothing does. Empty where the results are equal.
        seconds: of the step then and now; None: not done, or taken over from another run.
        missing: results that cannot be compared, because the recorded ones are gone or damaged.
    """

    name: str
    verdict: Verdict
    what: str
    largest: float | None = None
    causes: tuple[str, ...] = ()
    seconds: tuple[float | None, float | None] = (None, None)
    missing: tuple[str, ...] = ()


def compare(
    origin: Manifests, made: Manifests, store: Store, *, precision: str | None, stopped: str | None = None
) -> list[Step]:
    """Each step of ``origin`` beside the same of ``made``.

    Args:
        store: where both runs' lists of files and packages are kept.
        precision: ``train.precision`` of the run file; None of a flow that does not train.
        stopped: the last lines of a reproduction that did not go through.
    """
    rounding = _rounding(origin, precision)
    found: list[Step] = []
    for name, one in origin.items():
        other = made.get(name)
        if other is None:
            why = () if stopped is None or any(step.verdict == "not reached" for step in found) else (stopped,)
            found.append(Step(name, "not reached", "no result", causes=why, seconds=(one.seconds, None)))
        else:
            found.append(_step(one, other, store, rounding, first_difference(found)))
    return found


def first_difference(steps: list[Step]) -> Step | None:
    """The first that is neither equal nor within the noise."""
    return next((step for step in steps if step.verdict in ("differs", "not reached")), None)


def _step(one: StepManifest, other: StepManifest, store: Store, rounding: float | None, earlier: Step | None) -> Step:
    """``earlier``: the first step before this one that differs; what follows from it is no noise."""
    equal, unlike, unknown = _outputs(one, other)
    unlike += [f"check {check.name!r}" for check in one.checks if (check.name, check.passed) not in _outcomes(other)]
    losses, later = _losses(one), _losses(other)
    apart = {name: abs(later[name] - value) for name, value in losses.items() if name in later}
    largest = max(apart.values(), default=None)
    seconds = (None if one.reused else one.seconds, other.seconds)
    what = f"{equal} of {equal + len(unlike) + len(unknown)} results equal"
    missing = tuple(unknown)
    if missing:
        what += f"; gone or damaged, so not compared: {', '.join(missing)}"
    if not unlike and not largest:
        return Step(one.step, "equal", what, largest, seconds=seconds, missing=missing)
    ground = [] if earlier is None else [f"follows from {earlier.name}"]
    ground += _ground(one, other, store)
    what += f"; others: {', '.join(unlike)}" if unlike else ""
    moved = [name for name, value in apart.items() if value > 0]
    what += f"; first loss that differs: {moved[0]}, {losses[moved[0]]!r} -> {later[moved[0]]!r}" if moved else ""
    alone = sorted(losses.keys() - later.keys() | (set() if "metrics" in missing else later.keys() - losses.keys()))
    what += f"; losses that only one has: {told(iter(alone))}" if alone else ""
    if earlier is None and ground and not alone and _is_noise(one, unlike, losses, apart, rounding):
        return Step(one.step, "within noise", what, largest, tuple(ground), seconds, missing)
    causes = ground or ["nondeterminism: the same inputs, config, code, environment and hardware gave something else"]
    return Step(one.step, "differs", what, largest, tuple(causes), seconds, missing)


def _is_noise(
    one: StepManifest,
    unlike: list[str],
    losses: Mapping[str, float],
    apart: Mapping[str, float],
    rounding: float | None,
) -> bool:
    """Of a step on another ground: whether rounding may have done it."""
    if one.step in _DATA or rounding is None or any(name.startswith("check ") for name in unlike):
        return False
    steps = one.config.get("train", {}).get("steps") or 0
    allowed = {
        name: min(2 * rounding * (1 + _updates(name, steps)), _MOST * abs(value)) for name, value in losses.items()
    }
    return all(value <= allowed[name] for name, value in apart.items())


def _updates(loss: str, steps: int) -> int:
    """How many updates lie before a loss; of one that names no step all."""
    found = re.match(r"step (\d+)", loss)
    return steps if found is None else int(found[1])


def _rounding(origin: Manifests, precision: str | None) -> float | None:
    """The recorded limit of the rounding of logits in that precision."""
    if "convert_model" not in origin or precision is None:
        return None
    limits = {check.name: check.limit for check in origin["convert_model"].checks}
    limit = limits.get(_ROUNDING[precision])
    return limit if isinstance(limit, float) else None


def _outcomes(manifest: StepManifest) -> set[tuple[str, bool]]:
    return {(check.name, check.passed) for check in manifest.checks}


def _outputs(one: StepManifest, other: StepManifest) -> tuple[int, list[str], list[str]]:
    """How many outputs are equal, which are not, and which cannot be compared any more."""
    equal, unlike, unknown = 0, [], []
    for name in dict.fromkeys([*one.outputs, *other.outputs]):
        before, after = one.outputs.get(name), other.outputs.get(name)
        if before is None or after is None:
            unlike.append(f"{name}, which only one has")
        elif before.digest == after.digest:
            equal += 1
        elif before.kind not in _CONTENT:
            unlike.append(name)
        elif not _is_whole(before):
            unknown.append(name)
        elif _content(before) == _content(after):
            equal += 1
        else:
            unlike.append(name)
    return equal, unlike, unknown


def _is_whole(ref: ArtifactRef) -> bool:
    """Whether a result that was recorded is still there to be read."""
    place = published_place(ref.uri)
    return Path(ref.uri).exists() and (place is None or first_damage(place[0]) is None)


def _content(ref: ArtifactRef) -> Any:
    return _CONTENT[ref.kind](Path(ref.uri))


def _verification(path: Path) -> Any:
    """The gate's report but for where the model lay; the export's list of checks."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return {**found, "folder": None} if isinstance(found, dict) else found


def _reports(path: Path) -> list[Any]:
    return [unmeasured(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _checkpoint(folder: Path) -> Any:
    """Weights, optimiser, generators by digest; the state, whose report has times. The folder's own manifest has the
    digests of these, and so the state's."""
    from posttrain_lib.lineage.digests import digest_file

    files = {
        path.name: digest_file(path) for path in folder.iterdir() if path.name not in ("state.json", "manifest.json")
    }
    return files, unmeasured(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def unmeasured(value: Any) -> Any:
    """Reports and states without what a clock or the machine's memory says."""
    if isinstance(value, Mapping):
        return {name: unmeasured(item) for name, item in value.items() if _MEASURED.fullmatch(name) is None}
    return [unmeasured(item) for item in value] if isinstance(value, list) else value


#: kinds of results that hold a time or a place besides what was computed -> what was computed
_CONTENT: dict[str, Callable[[Path], Any]] = {
    "verification": _verification,
    "metrics": _reports,
    "checkpoint": _checkpoint,
}


def _losses(manifest: StepManifest) -> dict[str, float]:
    """Every loss that a step left, by name: of each update and evaluation, from the training's file, if it is there."""
    found = dict(_numbers({name: value for name, value in manifest.metrics.items() if name.startswith("held_out_")}))
    ref = manifest.outputs.get("metrics")
    if ref is not None and ref.kind == "metrics" and Path(ref.uri).is_file():
        for report in _reports(Path(ref.uri)):
            kept = {"loss": report["loss"], "held_out": report["held_out"]}
            found |= {f"step {report['step']} {name}": value for name, value in _numbers(kept)}
    return found


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _numbers(below, f"{path}.{name}" if path else str(name))
    elif isinstance(value, int | float):
        yield path, float(value)


def _ground(one: StepManifest, other: StepManifest, store: Store) -> Iterator[str]:
    """What differs of what a step was made from and by: data, config, code, environment, hardware."""
    inputs = {name: (ref, other.inputs.get(name)) for name, ref in one.inputs.items()}
    data = [
        f"{name} {ref.digest[:SHORT]} -> {'(none)' if now is None else now.digest[:SHORT]}"
        for name, (ref, now) in inputs.items()
        if ref.kind not in _CONTENT and (now is None or now.digest != ref.digest)
    ]
    if data:
        yield f"data: {', '.join(data)}"
    if config := told(differences(one.config, json.loads(json.dumps(other.config)))):
        yield f"config: {config}"
    if one.key_parts["source"] != other.key_parts["source"]:
        before, after = (sources_of(store, each.key_parts["source"]) or {} for each in (one, other))
        named = told(name for name, *_ in changes(before, after)) or "the lists of source files are not kept"
        yield f"code: {named}"
    if one.environment["lock"] != other.environment["lock"]:
        had, have = (packages_of(store, each.environment) or each.environment for each in (one, other))
        yield f"environment: {told(differences(had, have)) or 'the lock alone'}"
    if hardware := told(differences(one.hardware, other.hardware)):
        yield f"hardware: {hardware}"


def verdict(steps: list[Step]) -> str:
    """In a sentence."""
    first = first_difference(steps)
    if first is not None:
        return f"NOT reproduced: the first step that differs is {first.name} ({first.what})"
    noisy = [step.name for step in steps if step.verdict == "within noise"]
    bits = f"within the recorded noise in {', '.join(noisy)}, else bit for bit" if noisy else "bit for bit"
    missing = [f"{step.name} {name}" for step in steps for name in step.missing]
    return f"reproduced, {bits}" + (f"; gone or damaged, so not compared: {', '.join(missing)}" if missing else "")


def as_text(steps: list[Step]) -> str:
    """A line a step, for a terminal."""
    wide = max(len(step.name) for step in steps)
    lines = []
    for step in steps:
        times = " -> ".join("   -   " if each is None else f"{each:7.1f}" for each in step.seconds)
        lines.append(f"{step.name:<{wide}}  {step.verdict:<12}  {times} s  {step.what}")
        lines += [f"{'':<{wide}}    {cause}" for cause in step.causes]
    return "\n".join(lines)
