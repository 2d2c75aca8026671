"""An audit reads everything again and names what is no longer what was promoted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from posttrain_lib.errors import ConfigError, ModelError, StoreError, VerificationError
from posttrain_lib.lineage import pointer, promoted
from posttrain_lib.lineage.store import Store
from steps.audit import Audit, audit
from steps.promote import promote, rollback
from tests.support.exported import folder_of, publish_run


@pytest.fixture
def folder(isolated_store: Path) -> Path:
    """Of version 2, the current one."""
    promote(Store(), "mine", str(folder_of(publish_run(words="one"))))
    folder = folder_of(publish_run(words="two"))
    promote(Store(), "mine", str(folder))
    return folder


@pytest.fixture
def model(folder: Path, isolated_store: Path) -> Path:
    """The folder of its pointer and its versions' records."""
    return isolated_store / "models" / "mine"


def failed(found: Audit) -> list[str]:
    return [check.name for check in found.checks if not check.passed]


def cut(model: Path, left: int, current: int) -> None:
    """Take entries off the history's end, and set the current version to fit."""
    raw = json.loads((model / "pointer.json").read_text())
    (model / "pointer.json").write_text(json.dumps({**raw, "current": current, "history": raw["history"][:left]}))


def test_what_is_whole(folder: Path) -> None:
    found = audit(Store(), "mine")
    assert not failed(found) and len(found.history) == 2
    found.demand()
    digest = promoted.find(Store(), "mine", None, where="").digest[:12]
    assert [check.value for check in found.checks] == [
        "2", "entry 2", "0", "2", "2", f"version 2, digest {digest}"
    ]  # fmt: skip


def test_a_file_changed_behind_its_size_and_time(folder: Path) -> None:
    path = folder / "model.safetensors"
    status = path.stat()
    path.write_text("owt")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    found = audit(Store(), "mine")
    assert failed(found) == ["the current version's files have the digest that was promoted"]
    with pytest.raises(ModelError, match="version 2 is not what was promoted") as caught:
        found.demand()
    said = str(caught.value)
    digests = re.findall(r"digest ([0-9a-f]+)", said)
    assert [len(digest) for digest in digests] == [12, 12] and digests[0] != digests[1]
    assert "another version (1): python -m steps.promote --name mine --rollback VERSION --note WHY" in said
    rollback(Store(), "mine", 1, note="the folder was changed")
    assert not failed(audit(Store(), "mine"))


def test_a_pointer_changed_by_hand_and_a_model_that_is_none(model: Path) -> None:
    path = model / "pointer.json"
    path.write_text(path.read_text().replace('"current": 2', '"current": 1'))
    found = audit(Store(), "mine")
    assert failed(found) == ["the history is what was written"] and found.history == ()
    with pytest.raises(StoreError, match="changed by hand"):
        found.demand()
    with pytest.raises(ConfigError, match="no version yet") as caught:
        audit(Store(), "yours")
    assert "flows/audit_flow.py --config FILE run" in str(caught.value)


def test_a_pointer_that_is_gone_does_not_pass_and_a_rollback_begins_anew(model: Path) -> None:
    (model / "pointer.json").unlink()
    with pytest.raises(StoreError, match="pointer of a promoted model is gone"):
        audit(Store(), "mine").demand()
    with pytest.raises(StoreError, match="is gone"):
        promoted.find(Store(), "mine", None, where="model.path")
    entry = rollback(Store(), "mine", 1, note="the disk lost it")
    assert (entry.number, entry.version, entry.before) == (1, 1, None) and "begins here" in entry.why
    audit(Store(), "mine").demand()


@pytest.mark.parametrize("left", [1, 2])
def test_a_history_cut_at_its_end_does_not_pass(model: Path, left: int) -> None:
    rollback(Store(), "mine", 1, note="answers got worse")
    cut(model, left, current=left)
    with pytest.raises(StoreError, match="cut off at its end"):
        audit(Store(), "mine").demand()


def test_what_a_cut_history_still_shows_without_the_note_of_its_end(model: Path) -> None:
    cut(model, 1, current=1)
    (model / pointer.NEWEST).unlink()
    found = audit(Store(), "mine")
    assert failed(found) == ["the newest entry is noted beside it", "every version has an entry in the history"]
    with pytest.raises(VerificationError, match="several things") as caught:
        found.demand()
    assert "no entry of version 2" in str(caught.value) and "note of the history's newest entry" in str(caught.value)


def test_a_record_changed_by_hand_is_named_and_not_its_folder(model: Path, folder: Path) -> None:
    path = model / "2.json"
    digest = promoted.find(Store(), "mine", 2, where="").digest
    path.write_text(path.read_text().replace(digest, "0" * 64))
    with pytest.raises(StoreError, match="changed after it was written") as caught:
        promoted.find(Store(), "mine", None, where="model.path")
    assert str(path) in str(caught.value) and str(folder) not in str(caught.value)
    found = audit(Store(), "mine")
    assert failed(found)[0] == "the records of versions are what the history notes"
    with pytest.raises(StoreError, match="changed after it was written"):
        found.demand()


def test_a_record_that_is_gone_is_named(model: Path) -> None:
    (model / "1.json").unlink()
    with pytest.raises(StoreError, match="is gone"):
        audit(Store(), "mine").demand()
    again = promote(Store(), "mine", str(folder_of(publish_run(words="three"))))
    assert again.version == 3


def test_a_promotion_that_was_interrupted_is_named_and_can_be_mended(model: Path) -> None:
    """As a promotion leaves it that was killed before it moved the pointer."""
    (model / "3.json").write_text((model / "2.json").read_text().replace('"version": 2', '"version": 3'))
    found = audit(Store(), "mine")
    assert failed(found) == ["every version has an entry in the history"]
    with pytest.raises(StoreError, match="no entry of version 3"):
        found.demand()
    rollback(Store(), "mine", 3, note="it was to be the third")
    audit(Store(), "mine").demand()
