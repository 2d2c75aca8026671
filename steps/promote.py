"""Name a result: ``python -m steps.promote --name my-model --from SFTFlow/latest``; a run file then says
``model.path: models/my-model``.

Each call writes the next version of the name and makes it the current one; none is ever changed. A model whose checks
or gates failed is refused unless --force says why, which the version then tells. ``--rollback 3`` makes an earlier
version the current one again; ``--history`` shows every decision about the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import json
import os
from pathlib import Path
from typing import Any

from posttrain_lib.errors import ConfigError, VerificationError
from posttrain_lib.lineage import pointer, promoted
from posttrain_lib.lineage.pointer import Action, Entry
from posttrain_lib.lineage.promoted import Promoted
from posttrain_lib.lineage.store import Store, read_manifest
from posttrain_lib.schema.manifests import StepManifest
from steps import report
from steps.base import known_digests
from steps.start_from import check_published, exported_by, is_name, kind_of, resolve_model, run_named

_FROM, _ROLLBACK = "--from", "--rollback"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is to be promoted, and what speaks against it."""

    path: Path
    digest: str
    made_by: dict[str, Any]
    checks: tuple[dict[str, Any], ...]
    gates: tuple[dict[str, Any], ...]
    against: tuple[str, ...]


def promote(store: Store, name: str, source: str, *, note: str | None = None, force: str | None = None) -> Promoted:
    """Record ``source`` (a run's name, another promoted model or a folder) as the next version of ``name``.

    Raises:
        ConfigError, ModelError: there is no such model, or it is not whole.
        VerificationError: its checks, gates or run failed, and ``force`` gives no reason to take it all the same.
    """
    found = _candidate(source)
    if found.against and not force:
        raise VerificationError(
            "this model is not one to promote",
            where=_FROM,
            got=f"{source}: {'; '.join(found.against)}",
            expected="checks and gates that hold",
            fix="promote another one, or say why it is right all the same: --force REASON (it is recorded)",
        )
    version = Promoted(
        name=name,
        version=0,
        path=str(found.path),
        digest=found.digest,
        files=promoted.sizes(found.path),
        promoted_at=pointer.utc_now(),
        user=user(),
        **found.made_by,
        checks=found.checks,
        gates=found.gates,
        note=note,
        forced=f"{force} ({'; '.join(found.against)})" if found.against else None,
    )
    why = "; ".join(part for part in (f"from {source}", note, version.forced) if part)
    with promoted.deciding(store, name) as before:
        return promoted.record(store, version, before, decision("promoted", why, gates=found.gates))


def rollback(store: Store, name: str, version: int, *, note: str | None) -> Entry:
    """Make an earlier version the current one again; the history keeps that there was a later one.

    Raises:
        ConfigError: there is no such version, it is the current one, or no reason is given.
        ModelError: its folder is not what it was.
        StoreError: the pointer was changed by hand.
    """
    if not note:
        raise ConfigError("a rollback says why", where="--note", expected="a line for those who read the history")
    with promoted.deciding(store, name) as before:
        promoted.find(store, name, version, where=_ROLLBACK)
        if version == before.current:
            raise ConfigError("this version is the current one", where=_ROLLBACK, got=f"models/{name}@{version}")
        resolve_model(f"models/{name}@{version}", where=_ROLLBACK, needs="any")
        entry = dataclasses.replace(decision("rolled back", note), version=version)
        return pointer.append(store, name, before, entry).history[-1]


def decision(action: Action, why: str, *, gates: tuple[dict[str, Any], ...] = (), run: str | None = None) -> Entry:
    """An entry of the history by who runs this, now; number and versions come when it is appended."""
    return Entry(0, action, None, None, pointer.utc_now(), user(), why, "", run=run, gates=gates)


def told(store: Store, name: str) -> str:
    """Every decision about a model, the latest last, and versions that none of them made current.

    Raises:
        ConfigError: no such model.
        StoreError: the pointer was changed by hand.
    """
    found = promoted.pointer_of(store, name)
    if not found.history:
        promoted.find(store, name, None, where="--name")
    current = "none is the" if found.current is None else f"version {found.current} is the"
    lines = [f"models/{name}: {current} current one", *map(entry_line, found.history)]
    known = {entry.version for entry in found.history}
    for entry in promoted.versions_of(store, name):
        if entry.version not in known and (found.history or entry.version != found.current):
            lines.append(f"{'':>5} version {entry.version} ({entry.promoted_at}): no decision made it the current one")
    return "\n".join(lines)


def entry_line(entry: Entry) -> str:
    """An entry of the history in a line."""
    moved = "" if entry.version == entry.before else f"{entry.before or 'none'} -> {entry.version}"
    by = entry.by if entry.run is None else f"{entry.by}, {entry.run}"
    return f"{entry.number:>5} {entry.at:<27}{entry.action:<12}{moved:<12}{by}: {entry.why} [{entry.digest()[:12]}]"


def listing(store: Store) -> str:
    """A table of all versions."""
    lines = [f"{'model':<28}{'made by':<34}{'digest':<14}{'promoted':<27}{'by':<14}note"]
    for entry in promoted.all_promoted(store):
        made_by = f"{entry.flow}/{entry.run}" if entry.run is not None else "a folder"
        remarks = [
            *([entry.note] if entry.note else []),
            *([f"forced: {entry.forced}"] if entry.forced else []),
            *([] if Path(entry.path).is_dir() else [f"gone: {entry.path}"]),
        ]
        lines.append(
            f"models/{entry.label:<21}{made_by:<34}{entry.digest[:12]:<14}{entry.promoted_at:<27}{entry.user:<14}"
            f"{'; '.join(remarks)}".rstrip()
        )
    return "\n".join(lines) if len(lines) > 1 else f"no model was promoted in {store.root}"


def _candidate(source: str) -> Candidate:
    if not is_name(source, where=_FROM):
        return _folder(source)
    run = run_named(source, where=_FROM)
    if run is None:
        return _again(source)
    found = exported_by(run, where=_FROM, must_be_through=False)
    manifests = {step: StepManifest.from_dict(raw) for step, raw in run.manifests.items()}
    gates = report.gate_results(run.config, report.summarise(run.config, manifests))
    checks = tuple(dataclasses.asdict(check) for check in manifests["export"].checks)
    against = [*_failed(checks, gates), *([] if run.successful else [f"the run {run.state}"])]
    return Candidate(found.path, found.digest, found.lineage, checks, tuple(gates), tuple(against))


def _again(source: str) -> Candidate:
    """A promoted model under another name, or an older version made the latest: what was known of it still holds."""
    found = resolve_model(source, where=_FROM, needs="any")
    name, _, version = str(found.lineage["promoted"]).partition("@")
    entry = promoted.find(Store(), name, int(version), where=_FROM)
    made_by = {key: getattr(entry, key) for key in ("flow", "run", "step", "key", "tags")}
    against = _failed(entry.checks, list(entry.gates)) or ([entry.forced] if entry.forced else [])
    return Candidate(found.path, found.digest, made_by, entry.checks, entry.gates, tuple(against))


def _folder(source: str) -> Candidate:
    """A Hugging Face folder from anywhere; of one that a step export published its checks are known."""
    folder = Path(source).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(
            "neither a run, nor a promoted model, nor a folder",
            where=_FROM,
            got=source,
            expected="SFTFlow/<run id>, SFTFlow/latest, models/<name>[@<version>], or a Hugging Face folder",
        )
    export = read_manifest(folder) or read_manifest(folder.parent)
    if export is None or export.step != "export":
        kind_of(folder, _FROM, source)
        digests = known_digests()
        digest = digests.path(folder)
        digests.save()
        return Candidate(folder, digest, {}, (), (), ())
    ref = export.outputs["hf"]
    check_published(Path(ref.uri).parent, export.key, _FROM, source, "run the flow again")
    checks = tuple(dataclasses.asdict(check) for check in export.checks)
    made_by = {"step": "export", "key": export.key}
    return Candidate(Path(ref.uri), ref.digest, made_by, checks, (), tuple(_failed(checks, [])))


def _failed(checks: tuple[dict[str, Any], ...], gates: list[dict[str, Any]]) -> list[str]:
    """What does not hold, in words."""
    failed = [f"check '{check['name']}' failed" for check in checks if not check["passed"]]
    for gate in gates:
        if not gate["holds"]:
            value = "not measured" if gate["value"] is None else f"{gate['value']:.4f}"
            failed.append(f"gate on {gate['name']}: {value}, stated {gate['sense']} {gate['limit']}")
    return failed


def user() -> str:
    """Who promotes: as Metaflow names people, for an account may be shared."""
    return os.environ.get("METAFLOW_USER") or getpass.getuser()


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    from steps.pipeline import plain_errors

    parser = argparse.ArgumentParser(
        prog="python -m steps.promote", description="Give a model a name that a run file can say: models/<name>."
    )
    parser.add_argument("--name", help="of the model; its versions count up")
    parser.add_argument(
        _FROM, dest="source", metavar="MODEL", help="SFTFlow/<run id>, SFTFlow/latest, models/<name>, or a folder"
    )
    parser.add_argument("--note", help="a line for those who read the list")
    parser.add_argument("--force", metavar="REASON", help="promote what failed; the reason is recorded")
    parser.add_argument(
        _ROLLBACK,
        type=int,
        metavar="VERSION",
        help="make this version of --name the current one again; --note says why",
    )
    parser.add_argument("--history", action="store_true", help="show every decision about --name")
    parser.add_argument("--list", action="store_true", help="show what was promoted")
    parser.add_argument("--json", action="store_true", help="with --list: every field, as JSON lines")
    options = parser.parse_args(arguments)
    asked = [options.source is not None, options.rollback is not None, options.history]
    if sum(asked) + options.list != 1 or any(asked) != (options.name is not None):
        parser.error(f"give --name with {_FROM}, {_ROLLBACK} or --history; or --list")
    with plain_errors():
        store = Store()
        if options.source is not None:
            entry = promote(store, options.name, options.source, note=options.note, force=options.force)
            print(f"models/{entry.label} -> {entry.path}, digest {entry.digest[:12]}")
        if options.rollback is not None:
            moved = rollback(store, options.name, options.rollback, note=options.note)
            print(f"models/{options.name}: version {moved.version} is the current one, {moved.before} was")
        if options.history:
            print(told(store, options.name))
        if options.list and options.json:
            for entry in promoted.all_promoted(store):
                print(json.dumps(dataclasses.asdict(entry), sort_keys=True))
        elif options.list:
            print(listing(store))


if __name__ == "__main__":
    main()
