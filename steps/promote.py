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

from posttrain_lib.errors import ConfigError, StoreError, VerificationError
from posttrain_lib.lineage import pointer, promoted
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.pointer import Action, Entry
from posttrain_lib.lineage.promoted import Promoted
from posttrain_lib.lineage.store import Store, read_manifest
from posttrain_lib.schema.manifests import StepManifest
from steps import report
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
        ConfigError, ModelError: there is no such model, or it is not whole, or not what was published or promoted.
        StoreError: the pointer of ``name`` is lost, damaged or was changed by hand.
        VerificationError: its checks, gates or run failed, and ``force`` gives no reason to take it all the same.
    """
    found = _candidate(store, source)
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
        ModelError: its folder is not what was promoted.
        StoreError: the history is damaged or was changed by hand, or the version's record was. Where only the current
            version was, or the pointer is gone, this says anew which it is.
    """
    if not note:
        raise ConfigError("a rollback says why", where="--note", expected="a line for those who read the history")
    with promoted.deciding(store, name, settling=True) as before:
        wanted = promoted.find(store, name, version, where=_ROLLBACK)
        if version == before.current:
            raise ConfigError("this version is the current one", where=_ROLLBACK, got=f"models/{name}@{version}")
        promoted.check_folder(store, wanted, where=_ROLLBACK)
        vouched = [version] if before.history else promoted.numbers_of(store, name)
        why = note if before.history else f"{note}; the history begins here"
        entry = dataclasses.replace(
            decision("rolled back", why), version=version, records=promoted.record_digests(store, name, vouched)
        )
        return pointer.append(store, name, before, entry).history[-1]


def decision(action: Action, why: str, *, gates: tuple[dict[str, Any], ...] = (), run: str | None = None) -> Entry:
    """An entry of the history by who runs this, now; number and versions come when it is appended."""
    return Entry(0, action, None, None, pointer.utc_now(), user(), why, "", run=run, gates=gates)


def told(store: Store, name: str) -> str:
    """Every decision about a model, the latest last, and versions that none of them made current.

    Raises:
        ConfigError: no such model.
        StoreError: the pointer is lost, damaged or was changed by hand.
    """
    found = _history(store, name)
    current = "none is the" if found.current is None else f"version {found.current} is the"
    lines = [f"models/{name}: {current} current one", *map(entry_line, found.history)]
    for version in promoted.numbers_of(store, name):
        if version not in found.with_entry:
            lines.append(
                f"{'':>5} version {version} has no entry: its promotion was interrupted, or its entry was lost"
            )
    return "\n".join(lines)


def _history(store: Store, name: str) -> pointer.Pointer:
    found = promoted.pointer_of(store, name)
    if not found.history:
        promoted.find(store, name, None, where="--name")
    return found


def _history_as_json(store: Store, name: str) -> list[str]:
    """A line for each entry of the history: every field, and its digest."""
    history = _history(store, name).history
    return [json.dumps({**dataclasses.asdict(entry), "digest": entry.digest()}, sort_keys=True) for entry in history]


def entry_line(entry: Entry) -> str:
    """An entry of the history in a line."""
    moved = "" if entry.version == entry.before else f"{entry.before or 'none'} -> {entry.version}"
    by = entry.by if entry.run is None else f"{entry.by}, {entry.run}"
    return f"{entry.number:>5} {entry.at:<27}{entry.action:<12}{moved:<12}{by}: {entry.why} [{entry.digest()[:12]}]"


def listing(store: Store) -> str:
    """A table of all versions, the current ones marked; behind it the models of which it is not known which that is."""
    lines = [f"{'model':<28}{'current':<9}{'made by':<34}{'digest':<14}{'promoted':<27}{'by':<14}note"]
    versions = promoted.all_promoted(store)
    found = {name: _pointer_or_problem(store, name) for name in dict.fromkeys(entry.name for entry in versions)}
    for entry in versions:
        its = found[entry.name]
        current = "?" if isinstance(its, StoreError) else "yes" if its.current == entry.version else ""
        made_by = f"{entry.flow}/{entry.run}" if entry.run is not None else "a folder"
        remarks = [
            *([entry.note] if entry.note else []),
            *([f"forced: {entry.forced}"] if entry.forced else []),
            *([] if Path(entry.path).is_dir() else [f"gone: {entry.path}"]),
        ]
        lines.append(
            f"models/{entry.label:<21}{current:<9}{made_by:<34}{entry.digest[:12]:<14}{entry.promoted_at:<27}"
            f"{entry.user:<14}{'; '.join(remarks)}".rstrip()
        )
    problems = [f"models/{name}: {its}" for name, its in found.items() if isinstance(its, StoreError)]
    return "\n".join([*lines, *problems]) if versions else f"no model was promoted in {store.root}"


def _list_as_json(store: Store) -> list[str]:
    """A line for each version: every field, and whether it is the current one; null where that is not known."""
    lines = []
    for entry in promoted.all_promoted(store):
        its = _pointer_or_problem(store, entry.name)
        current = None if isinstance(its, StoreError) else its.current == entry.version
        lines.append(json.dumps({**dataclasses.asdict(entry), "current": current}, sort_keys=True))
    return lines


def _pointer_or_problem(store: Store, name: str) -> pointer.Pointer | StoreError:
    """What is wrong with one model must not hide the others from a list; it is shown there."""
    try:
        return promoted.pointer_of(store, name)
    except StoreError as error:
        return error


def _candidate(store: Store, source: str) -> Candidate:
    if not is_name(source, where=_FROM):
        return _folder(source)
    run = run_named(source, where=_FROM)
    if run is None:
        return _again(store, source)
    found = exported_by(run, where=_FROM, must_be_through=False)
    manifests = {step: StepManifest.from_dict(raw) for step, raw in run.manifests.items()}
    gates = report.gate_results(run.config, report.summarise(run.config, manifests))
    checks = tuple(dataclasses.asdict(check) for check in manifests["export"].checks)
    against = [*_failed(checks, gates), *([] if run.successful else [f"the run {run.state}"])]
    return Candidate(found.path, found.digest, found.lineage, checks, tuple(gates), tuple(against))


def _again(store: Store, source: str) -> Candidate:
    """A promoted model under another name, or an older version made the latest: what was known of it still holds."""
    found = resolve_model(source, where=_FROM, needs="any")
    name, _, version = str(found.lineage["promoted"]).partition("@")
    entry = promoted.find(store, name, int(version), where=_FROM)
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
        return Candidate(folder, FileDigests().path(folder), {}, (), (), ())
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
    parser.add_argument("--json", action="store_true", help="with --list or --history: every field, as JSON lines")
    options = parser.parse_args(arguments)
    asked = [options.source is not None, options.rollback is not None, options.history]
    if sum(asked) + options.list != 1 or any(asked) != (options.name is not None):
        parser.error(f"give --name with {_FROM}, {_ROLLBACK} or --history; or --list")
    if options.json and not (options.list or options.history):
        parser.error("--json goes with --list or --history")
    with plain_errors():
        store = Store()
        if options.source is not None:
            entry = promote(store, options.name, options.source, note=options.note, force=options.force)
            print(f"models/{entry.label} -> {entry.path}, digest {entry.digest[:12]}")
        if options.rollback is not None:
            moved = rollback(store, options.name, options.rollback, note=options.note)
            was = "which one was is not known" if moved.before is None else f"{moved.before} was"
            print(f"models/{options.name}: version {moved.version} is the current one, {was}")
        if options.history:
            for line in _history_as_json(store, options.name) if options.json else [told(store, options.name)]:
                print(line)
        if options.list:
            for line in _list_as_json(store) if options.json else [listing(store)]:
                print(line)


if __name__ == "__main__":
    main()
