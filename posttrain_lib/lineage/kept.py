"""What manifests name by digest alone, kept once in the store: patches, lists of source files, lists of packages.

<root>/records/<sha256>.patch   what the checkout had besides its commit
<root>/records/<sha256>.json    source files of a step with their digests (the key part ``source`` is their digest);
                                names and versions of all packages
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage.digests import canonical, digest_bytes, write_atomically
from posttrain_lib.lineage.environment import describe_code, describe_environment, installed_packages
from posttrain_lib.lineage.patch import uncommitted
from posttrain_lib.lineage.source_digest import PROJECT_ROOT, source_digests, user_code
from posttrain_lib.lineage.store import Store, disk_errors

RECORDS = "records"


def record_file(store: Store, digest: str, kind: str) -> Path:
    """Where the record of that digest stands, if it is kept. ``kind``: patch or json."""
    return store.root / RECORDS / f"{digest}.{kind}"


def keep(store: Store, content: bytes, kind: str) -> str:
    """Keep ``content`` once and return its sha256.

    Raises:
        StoreError: the disk says no.
    """
    digest = digest_bytes(content)
    path = record_file(store, digest, kind)
    if not path.is_file():
        with disk_errors("keeping a record", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
    return digest


def read_record(store: Store, digest: str, kind: str) -> bytes | None:
    """A record's content; None where it is not kept (any more).

    Raises:
        StoreError: it is not what its name says.
    """
    path = record_file(store, digest, kind)
    if not path.is_file():
        return None
    content = path.read_bytes()
    if digest_bytes(content) != digest:
        raise StoreError(
            "a record was changed after it was kept",
            where=path,
            got=f"sha256 {digest_bytes(content)[:12]}",
            expected=f"{digest[:12]}, its name",
            fix="put it back, or remove it: what it told of runs is then not known",
        )
    return content


def keep_code(store: Store) -> dict[str, str]:
    """Commit, whether the tree differs from it, and how: ``patch`` is the digest of the kept patch, or
    ``patch_not_kept`` says why there is none; ``patch_left_out`` names files that it lacks."""
    code = describe_code()
    if code.get("uncommitted_changes") != "yes":
        return code
    found = uncommitted(PROJECT_ROOT)
    if found.content is None:
        code["patch_not_kept"] = found.reason
    else:
        code["patch"] = keep(store, found.content, "patch")
    return code | ({"patch_left_out": found.left_out} if found.left_out else {})


def keep_environment(store: Store) -> dict[str, str]:
    """Lock and versions, and the digest of the list of all packages."""
    return {**describe_environment(), "packages": _keep_value(store, list(installed_packages()))}


def packages_of(store: Store, environment: dict[str, str]) -> dict[str, str] | None:
    """Package -> version of a manifest's environment; None where the list is not kept."""
    listed = _value(store, environment.get("packages", ""))
    return None if listed is None else dict(entry.split("==", 1) for entry in listed)


def keep_sources(store: Store, source: str, module: str, references: Iterable[str]) -> None:
    """Keep the list of source files that a step reaches.

    Args:
        source: digest of the list, the key part of that name; nothing is read again where its list is kept.
        module: the step's.
        references: ``module:attribute`` of a user's own code.
    """
    if record_file(store, source, "json").is_file():
        return
    files, own = source_digests(module), user_code(references)
    digest = _keep_value(store, files)
    if own:
        _keep_value(store, [digest, own])


def sources_of(store: Store, digest: str) -> dict[str, str] | None:
    """File -> sha256 of a manifest's key part ``source``, a user's own code by its reference; None where the list is
    not kept."""
    found = _value(store, digest)
    if not isinstance(found, list):
        return found
    files = _value(store, found[0])
    return None if files is None else {**files, **found[1]}


def _keep_value(store: Store, value: Any) -> str:
    return keep(store, canonical(value).encode("utf-8"), "json")


def _value(store: Store, digest: str) -> Any:
    content = read_record(store, digest, "json")
    return None if content is None else json.loads(content)
