"""Is a promoted model still what was promoted: its history, its versions' records, every byte of its current folder.

What was cut off a history's end is found by what else notes it: newest.json beside it, and the records of versions.
Where newest.json was made to fit, rollbacks and rejections behind the last promotion that is left can be cut unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain_lib.errors import ConfigError, ModelError, PosttrainError, StoreError, VerificationError
from posttrain_lib.lineage import pointer, promoted
from posttrain_lib.lineage.pointer import Entry, Pointer
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import Check


@dataclass(frozen=True)
class Audit:
    """What was proved of a promoted model.

    Attributes:
        checks: one for each proof, failed ones among them.
        history: every decision, empty where it cannot be read.
        problems: the error of each check that failed, in their order.
    """

    name: str
    checks: tuple[Check, ...]
    history: tuple[Entry, ...]
    problems: tuple[PosttrainError, ...]

    def demand(self) -> None:
        """Raise where something does not hold.

        Raises:
            ModelError, StoreError: what does not hold.
            VerificationError: several things do not; all are named.
        """
        distinct = list({str(problem): problem for problem in self.problems}.values())
        if len(distinct) == 1:
            raise distinct[0]
        if distinct:
            raise VerificationError(
                "several things of this model are not what was promoted",
                where=f"models/{self.name}",
                got="; ".join(map(_in_a_line, distinct)),
                fix="; ".join(dict.fromkeys(problem.fix for problem in distinct if problem.fix is not None)),
            )


def audit(store: Store, name: str) -> Audit:
    """Prove what can be proved of ``models/<name>``; what does not hold is in the result.

    Raises:
        ConfigError: no version was promoted yet.
    """
    try:
        found = promoted.pointer_of(store, name)
    except StoreError as error:
        return Audit(name, (_failed("the history is what was written", error),), (), (error,))
    if found.current is None:
        raise ConfigError(
            "there is no version yet",
            where="name",
            got=f"models/{name}",
            expected="a model that a retrain or python -m steps.promote made a version of",
            fix="give the retrain's own file: python flows/audit_flow.py --config FILE run; without it, "
            "configs/retrain/default.yaml names the model",
        )
    current = found.current
    proofs: dict[str, Callable[[], str]] = {
        "the history is what was written": lambda: str(len(found.history)),
        "the newest entry is noted beside it": lambda: _newest(store, name, found),
        "the lists of files that retrains took are what was written": lambda: _taken(store, name, found),
        "every version has an entry in the history": lambda: _entries(store, name, found),
        "the records of versions are what the history notes": lambda: _records(store, name, found),
        "the current version's files have the digest that was promoted": lambda: _current(store, name, current),
    }
    checks, problems = [], []
    for what, proof in proofs.items():
        try:
            checks.append(Check(what, True, proof()))
        except (StoreError, ModelError) as error:
            checks.append(_failed(what, error))
            problems.append(error)
    return Audit(name, tuple(checks), found.history, tuple(problems))


def _newest(store: Store, name: str, found: Pointer) -> str:
    """Reading the pointer has compared the two; here it counts that there is a note."""
    noted = pointer.newest_noted(store, name)
    if noted is not None:
        return f"entry {noted}"
    if not found.records:
        return "not noted: every entry is of format 1"
    raise StoreError(
        "the note of the history's newest entry is gone: entries at its end may be cut off",
        where=store.root / "models" / name / pointer.NEWEST,
        expected=f"entry {len(found.history)} or an earlier one",
        fix=f"see whether python -m steps.promote --name {name} --history ends with the newest decision that you know "
        "of; the next decision writes the note",
    )


def _taken(store: Store, name: str, found: Pointer) -> str:
    digests = [entry.rows for entry in found.history if entry.rows is not None]
    for digest in digests:
        pointer.rows_of(store, name, digest)
    return str(len(digests))


def _entries(store: Store, name: str, found: Pointer) -> str:
    versions = promoted.numbers_of(store, name)
    without = [version for version in versions if version not in found.with_entry]
    if without:
        raise StoreError(
            "versions of the model have no entry in its history: entries were lost, or a promotion was interrupted",
            where=promoted.record_file(store, name, without[0]),
            got=f"no entry of version {', '.join(map(str, without))}",
            expected="an entry for each promotion",
            fix="put pointer.json back from a backup; where a promotion was interrupted, give its version an entry: "
            f"{pointer.rollback_command(name, without[0])}; a second rollback makes another one the current one again",
        )
    return str(len(versions))


def _records(store: Store, name: str, found: Pointer) -> str:
    for version in found.records:
        promoted.check_record(store, name, version, found)
    older = len(found.with_entry) - len(found.records)
    unnoted = f"; of {older} more the history notes no digest (format 1)" if older else ""
    return f"{len(found.records)}{unnoted}"


def _current(store: Store, name: str, current: int) -> str:
    version = promoted.find(store, name, current, where="name")
    promoted.check_folder(store, version, where="name")
    return f"version {current}, digest {version.digest[:12]}"


def _failed(what: str, error: PosttrainError) -> Check:
    reason = error.what if error.fix is None else f"{error.what}. To mend it: {error.fix}"
    return Check(what, False, error.got, error.expected, reason)


def _in_a_line(problem: PosttrainError) -> str:
    said = ", ".join(part for part in (problem.where, problem.got) if part is not None)
    return f"{problem.what} ({said})" if said else problem.what
