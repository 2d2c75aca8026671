"""Is a promoted model still what was promoted: its history, its pointer, and every byte of its current folder."""

from __future__ import annotations

from pathlib import Path

from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.lineage import pointer, promoted
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import Check


def audit(store: Store, name: str) -> list[Check]:
    """What was proved of ``models/<name>``.

    Raises:
        ConfigError: no version was promoted yet.
        StoreError: pointer, history or a retrain's list of files was changed by hand.
        ModelError: a file of the current version's folder is gone or has other content.
    """
    found = promoted.pointer_of(store, name)
    if found.current is None:
        raise ConfigError("there is no version yet", where="name", got=f"models/{name}")
    taken = [pointer.rows_of(store, name, entry.rows) for entry in found.history if entry.rows is not None]
    version = promoted.find(store, name, found.current, where="name")
    # Read whole, nothing remembered: a file changed behind its size and time is what this looks for.
    digest = FileDigests().path(Path(version.path)) if Path(version.path).is_dir() else "the folder is gone"
    if digest != version.digest:
        raise ModelError(
            "the current version's folder is not what was promoted",
            where=version.path,
            got=digest[:19],
            expected=f"{version.digest[:12]}, as models/{version.label} has",
            fix=f"make it again from {version.flow}/{version.run}, or python -m steps.promote --name {name} --rollback",
        )
    never = sorted({e.version for e in promoted.versions_of(store, name)} - {e.version for e in found.history})
    return [
        Check("every entry of the history has the digest that the next one names", True, float(len(found.history))),
        Check("the lists of files that retrains took are what was written", True, float(len(taken))),
        Check("the current version's files have the digest that was promoted", True, version.digest[:12]),
        Check(
            "every version was the current one at some time",
            not never or not found.history,
            ", ".join(map(str, never)) or "all",
            reason="one that never was is of a promotion that was interrupted, or the history's end was cut off",
        ),
    ]
