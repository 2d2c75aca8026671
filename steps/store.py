"""The store on the command line: ``python -m steps.store report`` and ``python -m steps.store clean``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.promoted import all_promoted
from posttrain_lib.lineage.store import Entry, Store
from steps.pipeline import plain_errors

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


def clean(store: Store, *, older_than_days: float, dry_run: bool) -> str:
    """Remove what was not used for so long; what a running step holds stays, and what was promoted."""
    horizon = time.time() - older_than_days * _DAY_SECONDS
    named = {Path(entry.path).resolve(): entry.label for entry in all_promoted(store)}
    lines, freed = [], 0.0
    for entry in store.entries():
        if entry.used_at > horizon:
            continue
        label = next((label for path, label in named.items() if path.is_relative_to(entry.path.resolve())), None)
        if label is not None:
            lines.append(f"kept (promoted as models/{label}) {entry.kind}/{entry.step}/{entry.key[:12]}")
            continue
        removed = dry_run or store.remove(entry)
        freed += _mib(entry) if removed else 0.0
        verb = ("would remove" if dry_run else "removed") if removed else "kept (in use)"
        lines.append(f"{verb} {entry.kind}/{entry.step}/{entry.key[:12]} ({_mib(entry):.1f} MiB)")
    lines.append(f"{'would free' if dry_run else 'freed'} {freed:.1f} MiB")
    return "\n".join(lines)


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
    cleaning = commands.add_parser("clean", help="remove results and left-over work not used for some time")
    cleaning.add_argument("--older-than-days", type=_days, default=7.0, help="default: %(default)s")
    cleaning.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    options = parser.parse_args(arguments)
    with plain_errors():
        if options.store is not None and not options.store.is_dir():
            raise StoreError("there is no such store", where=options.store, fix="name the folder of a store")
        store = Store(options.store)
        if options.command == "report":
            print(report(store))
        else:
            print(clean(store, older_than_days=options.older_than_days, dry_run=options.dry_run))


if __name__ == "__main__":
    main()
