"""The store on the command line: ``python -m steps.store report`` and ``python -m steps.store clean``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.graph import HERE, Raw, result_of, trace
from posttrain_lib.lineage.promoted import all_promoted
from posttrain_lib.lineage.store import Entry, Store
from posttrain_lib.schema.manifests import StepManifest
from steps.pipeline import plain_errors

if TYPE_CHECKING:
    from posttrain_lib.adapters.metaflow_runs import FlowRun

_DAY_SECONDS = 86_400.0


def report(store: Store) -> str:
    """A table of what takes space, by step, newest use last."""
    entries = store.entries()
    lines = [f"store {store.root}", f"{'kind':<7}{'step':<16}{'key':<14}{'MiB':>10}  last used"]
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        lines.append(f"{entry.kind:<7}{entry.step:<16}{entry.key[:12]:<14}{_mib(entry):>10.1f}  {used}")
    lines.append(f"{len(entries)} entries, {sum(map(_mib, entries)):.1f} MiB")
    return "\n".join(lines)


def clean(store: Store, *, older_than_days: float, dry_run: bool, tagged: Iterable[FlowRun]) -> str:
    """Remove what was not used for so long. What runs with a tag and promoted models came from stays, whole: their
    results and all that these were made of; so does what a running step holds or reads.

    Raises:
        StoreError: a manifest that leads on to what must stay cannot be read or was changed.
    """
    horizon = time.time() - older_than_days * _DAY_SECONDS
    needed = _needed(store, tagged)
    lines, freed = [], 0.0
    for entry in store.entries():
        if entry.used_at > horizon:
            continue
        reason = needed.get((entry.step, entry.key)) if entry.kind == "steps" else None
        if reason is not None:
            lines.append(f"kept (for {reason}) {_told(entry)}")
            continue
        removed = dry_run or store.remove(entry)
        freed += _mib(entry) if removed else 0.0
        verb = ("would remove" if dry_run else "removed") if removed else "kept (in use)"
        lines.append(f"{verb} {_told(entry)}")
    lines.append(f"{'would free' if dry_run else 'freed'} {freed:.1f} MiB")
    return "\n".join(lines)


def _needed(store: Store, tagged: Iterable[FlowRun]) -> dict[tuple[str, str], str]:
    """(step, key) of every result that must stay -> for what."""
    wanted = []
    for entry in all_promoted(store):
        made = result_of(store, entry.path)
        wanted += [(f"models/{entry.label}", [made])] if made is not None else []
    for run in tagged:
        manifests = [StepManifest.from_dict(raw) for raw in run.manifests.values()]
        wanted.append((f"{run.flow}/{run.run}, tagged {', '.join(run.tags)}", manifests))
    found: dict[tuple[str, str], str] = {}
    for reason, manifests in wanted:
        for result in trace(store, manifests, lambda *_: Raw(HERE)).results():
            found.setdefault(result, reason)
    return found


def _told(entry: Entry) -> str:
    used = time.strftime("%Y-%m-%d", time.gmtime(entry.used_at))
    return f"{entry.kind}/{entry.step}/{entry.key[:12]} ({_mib(entry):.1f} MiB, last used {used})"


def _days(text: str) -> float:
    """NaN and negative numbers would call everything old."""
    days = float(text)
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days")
    return days


def _mib(entry: Entry) -> float:
    return entry.size_bytes / 2**20


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m steps.store", description="Size and clean-up of the artifact store."
    )
    parser.add_argument(
        "--store", type=Path, default=None, help="store folder (default: $POSTTRAIN_STORE or .posttrain/)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="what is in the store and how large it is")
    cleaning = commands.add_parser(
        "clean",
        help="say which results and left-over work were not used for some time, and remove them if asked to",
        description="Results and left-over work that were not used for some time. What tagged runs and promoted models "
        "came from stays, and what a running step holds or reads. Patches and lists of files stay: they are small.",
    )
    cleaning.add_argument(
        "--older-than-days",
        type=_days,
        default=7.0,
        help="default: %(default)s; a run that stands between two steps is safe by this alone",
    )
    cleaning.add_argument("--remove", action="store_true", help="remove it; without this nothing is")
    options = parser.parse_args(arguments)
    with plain_errors():
        if options.store is not None and not options.store.is_dir():
            raise StoreError("there is no such store", where=options.store, fix="name the folder of a store")
        store = Store(options.store)
        if options.command == "report":
            print(report(store))
        else:
            from posttrain_lib.adapters import metaflow_runs

            tagged = metaflow_runs.tagged_runs()
            print(f"store {store.root}; {len(tagged)} tagged runs in Metaflow's records in {metaflow_runs.records()}")
            print(clean(store, older_than_days=options.older_than_days, dry_run=not options.remove, tagged=tagged))
            if not options.remove:
                print("nothing was removed: --remove does it")


if __name__ == "__main__":
    main()
