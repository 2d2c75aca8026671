"""Two runs side by side: what differs in data, config, code, environment and checks, and in results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_lib.evaluation.comparison import shown
from posttrain_lib.lineage.kept import packages_of, sources_of
from posttrain_lib.lineage.store import Store
from posttrain_lib.lineage.tree import SHORT
from posttrain_lib.schema.manifests import Check, StepManifest
from steps import report
from steps.recorded import from_outside
from steps.unfinished import changes, differences, shortened, told

#: what differs: its name, what the first run has, what the second has
Row = tuple[str, str, str]
_NONE = "(none)"
#: characters of a value on a terminal
_CELL = 60
_COUNTED = ("sources", "refused")


@dataclass(frozen=True)
class Side:
    """One of the two. ``config``: the run file; None where it is not known; ``manifests`` in their order."""

    name: str
    config: Mapping[str, Any] | None
    manifests: Mapping[str, StepManifest]

    def by_step(self) -> Mapping[str, Any]:
        """The config of each step."""
        return {step: manifest.config for step, manifest in self.manifests.items()}


@dataclass(frozen=True)
class Differences:
    """What differs between two runs.

    Attributes:
        first: the first step that is not the same work in both, and why; None where all are the same.
        parts: data, config, code, environment, checks, results -> rows; results have the difference behind the second.
    """

    first: str | None
    parts: dict[str, list[Row]]


def compare_runs(store: Store, a: Side, b: Side) -> Differences:
    """Hold two runs side by side; by the configs of their steps where the run file of one is not known."""
    configs = (a.by_step(), b.by_step()) if a.config is None or b.config is None else (a.config, b.config)
    parts = {
        "data": [*_changes(_data(a), _data(b))],
        "config": [*changes(*configs)],
        "code": [*_changes(_code(store, a), _code(store, b))],
        "environment": [*_changes(_environment(store, a), _environment(store, b))],
        "checks": [*_changes(_checks(a), _checks(b))],
        "results": [*_results(a, b)],
    }
    return Differences(first_difference(store, a, b), parts)


def first_difference(store: Store, a: Side, b: Side) -> str | None:
    """The first step whose content keys differ, with what of the key does."""
    for step in dict.fromkeys([*a.manifests, *b.manifests]):
        one, other = a.manifests.get(step), b.manifests.get(step)
        if one is None or other is None:
            return f"{step}, which only {(a if other is None else b).name} has"
        if one.key != other.key:
            parts = [name for name, value in one.key_parts.items() if other.key_parts.get(name) != value]
            return f"{step}: {'; '.join(_why(store, name, one, other) for name in parts)}"
    return None


def text(found: Differences, a: Side, b: Side) -> str:
    """For a terminal."""
    lines = [f"a  {a.name}", f"b  {b.name}"]
    lines.append(f"first step that differs: {found.first or 'none, every step is the same work'}")
    for part, rows in found.parts.items():
        lines.append(f"\n{part}: {'the same' if not rows else f'{len(rows)} differ'}")
        cells = [[name, shortened(one, _CELL), shortened(other, _CELL)] for name, one, other in rows]
        wide, less = (max((len(row[column]) for row in cells), default=0) for column in (0, 1))
        lines += [f"  {name:<{wide}}  {one:<{less}}  {other}" for name, one, other in cells]
    return "\n".join(lines)


def _why(store: Store, part: str, one: StepManifest, other: StepManifest) -> str:
    if part == "config":
        return f"config ({told(differences(one.config, other.config))})"
    if part == "inputs":
        names = [name for name, *_ in _changes(_digests(one.inputs), _digests(other.inputs))]
        return f"inputs ({', '.join(names)})"
    if part == "source":
        files = [name for name, *_ in _changes(_sources(store, [one]), _sources(store, [other]))]
        return f"source ({told(iter(files))})"
    return f"{part} ({one.key_parts[part][:SHORT]} -> {other.key_parts[part][:SHORT]})"


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Row]:
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield name, a.get(name, _NONE), b.get(name, _NONE)


def _digests(refs: Mapping[str, Any]) -> dict[str, str]:
    return {name: ref.digest[:SHORT] for name, ref in refs.items()}


def _data(side: Side) -> dict[str, str]:
    """Digests of what the run began with, and what came of the rows."""
    made = side.manifests["inputs"].outputs if "inputs" in side.manifests else {}
    found = _digests({**from_outside(side.manifests), **made})
    if "prepare_data" in side.manifests:
        receipt = side.manifests["prepare_data"].metrics
        found |= {name: str(value) for name, value in _flat({name: receipt[name] for name in _COUNTED})}
    return found


def _code(store: Store, side: Side) -> dict[str, str]:
    last = _last(side)
    code = {name: value[:SHORT] if name in ("commit", "patch") else value for name, value in last.code.items()}
    return {**code, **_sources(store, side.manifests.values())}


def _sources(store: Store, manifests: Any) -> dict[str, str]:
    """File -> digest of all that the steps reach; of a step whose list is not kept the digest of the list."""
    found: dict[str, str] = {}
    for manifest in manifests:
        digest = manifest.key_parts["source"]
        files = sources_of(store, digest)
        listed = {f"sources of {manifest.step}": digest} if files is None else files
        found |= {name: value[:SHORT] for name, value in listed.items()}
    return found


def _environment(store: Store, side: Side) -> dict[str, str]:
    last = _last(side)
    packages = packages_of(store, last.environment)
    named = {} if packages is None else {f"package {name}": version for name, version in packages.items()}
    return {**last.environment, **last.hardware, **named}


def _last(side: Side) -> StepManifest:
    return max(side.manifests.values(), key=lambda manifest: manifest.started_at)


def _checks(side: Side) -> dict[str, str]:
    return {f"{step}: {check.name}": _said(check) for step, m in side.manifests.items() for check in m.checks}


def _said(check: Check) -> str:
    value = f"{check.value:.4g}" if isinstance(check.value, float) else check.value
    return ("passed" if check.passed else "FAILED") + ("" if value is None else f" ({value})")


def _results(a: Side, b: Side) -> Iterator[Row]:
    summarised = _is_summarised(a) and _is_summarised(b)
    one, other = (_summary(side) if summarised else _metrics(side) for side in (a, b))
    for name in dict.fromkeys([*one, *other]):
        before, after = one.get(name), other.get(name)
        if before != after:
            change = _mean(after) - _mean(before) if _is_number(before) and _is_number(after) else None
            yield name, _figure(before), _figure(after) + ("" if change is None else f"  ({change:+.4g})")


def _is_summarised(side: Side) -> bool:
    """Whether the run came as far as its summary."""
    return bool(side.config) and {"train", "evaluate", "export"} <= side.manifests.keys()


def _metrics(side: Side) -> dict[str, Any]:
    kept = {step: manifest.metrics for step, manifest in side.manifests.items() if step != "prepare_data"}
    return {name: value for name, value in _flat(kept) if _is_number(value)}


def _summary(side: Side) -> dict[str, Any]:
    """The summary that the run's flow ends with, its comparison by task."""
    summary = report.summarise(dict(side.config or {}), side.manifests)
    rows = summary.pop("comparison")
    named = {f"{row['task']}.{row['metric']} of {row['group']}": row["after"] for row in rows}
    return {**{name: value for name, value in _flat(summary) if _is_number(value)}, **named}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value below, by its path; lists are left out."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _flat(below, f"{path}.{name}" if path else str(name))
    elif not isinstance(value, list) and value is not None:
        yield path, value


def _is_number(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, int | float) and not isinstance(value, bool))


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, Mapping) else value)


def _figure(value: Any) -> str:
    if value is None:
        return _NONE
    if isinstance(value, Mapping):
        return shown(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
