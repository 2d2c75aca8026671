"""What manifests name by digest is kept once and is what its name says."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage import kept
from posttrain_lib.lineage.digests import digest_value
from posttrain_lib.lineage.environment import describe_code
from posttrain_lib.lineage.kept import (
    keep,
    keep_code,
    keep_environment,
    keep_sources,
    packages_of,
    read_record,
    record_file,
    sources_of,
)
from posttrain_lib.lineage.patch import Patch
from posttrain_lib.lineage.source_digest import PROJECT_ROOT, source_digest, source_digests, user_code
from posttrain_lib.lineage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_a_record_is_kept_once(store: Store) -> None:
    digest = keep(store, b"some bytes", "patch")
    path = record_file(store, digest, "patch")
    before = path.stat().st_mtime_ns
    assert keep(store, b"some bytes", "patch") == digest and path.stat().st_mtime_ns == before
    assert read_record(store, digest, "patch") == b"some bytes"
    assert read_record(store, "0" * 64, "patch") is None


def test_a_record_changed_by_hand_is_named(store: Store) -> None:
    digest = keep(store, b"some bytes", "patch")
    record_file(store, digest, "patch").write_bytes(b"others")
    with pytest.raises(StoreError, match="changed after it was kept") as caught:
        read_record(store, digest, "patch")
    assert caught.value.where == str(record_file(store, digest, "patch"))


def test_sources_are_kept_under_the_key_part_that_names_them(store: Store) -> None:
    source = source_digest("posttrain_lib.errors")
    keep_sources(store, source, "posttrain_lib.errors", [])
    assert sources_of(store, source) == source_digests("posttrain_lib.errors")
    assert sources_of(store, "0" * 64) is None


def test_a_user_s_own_code_is_among_them(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_loss_of_lineage.py").write_text("class Mine: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    reference = "own_loss_of_lineage:Mine"
    source = digest_value([source_digest("posttrain_lib.errors"), user_code([reference])])
    for _ in range(2):
        keep_sources(store, source, "posttrain_lib.errors", [reference])
    found = sources_of(store, source)
    assert found is not None and set(found) == {reference, *source_digests("posttrain_lib.errors")}


def test_packages(store: Store) -> None:
    environment = keep_environment(store)
    found = packages_of(store, environment)
    assert found is not None and found["torch"] == environment["torch"].lower()
    by_themselves = {_plain(str(item.name)): item.version.lower() for item in metadata.distributions()}
    assert {_plain(name): version for name, version in found.items()} == by_themselves
    assert packages_of(store, {"lock": "x"}) is None


def _plain(name: str) -> str:
    """A package's name as all spellings of it are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(not describe_code(), reason="not a git checkout")
@pytest.mark.parametrize(
    ("patch", "wanted"),
    [
        (Patch(b"diff"), {"patch"}),
        (Patch(b"diff", left_out="rows.jsonl (9.0 MiB)"), {"patch", "patch_left_out"}),
        (Patch(None, reason="9.0 MiB of changes"), {"patch_not_kept"}),
    ],
)
def test_what_a_manifest_says_of_the_code(
    store: Store, patch: Patch, wanted: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = describe_code()["commit"]
    for changed, more in (("yes", wanted), ("no", set())):
        monkeypatch.setattr(kept, "describe_code", lambda c=changed: {"commit": commit, "uncommitted_changes": c})
        monkeypatch.setattr(kept, "uncommitted", lambda root: patch if root == PROJECT_ROOT else None)
        code = keep_code(store)
        assert set(code) == {"commit", "uncommitted_changes", *more}
    assert "patch" not in wanted or read_record(store, keep(store, b"diff", "patch"), "patch") == b"diff"
