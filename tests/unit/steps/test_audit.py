"""An audit reads everything again and names what is no longer what was promoted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from posttrain_lib.errors import ConfigError, ModelError, StoreError
from posttrain_lib.lineage import promoted
from posttrain_lib.lineage.store import Store
from steps.audit import audit
from steps.promote import promote, rollback
from tests.support.exported import folder_of, publish_run


@pytest.fixture
def folder(isolated_store: Path) -> Path:
    """Of version 2, the current one."""
    promote(Store(), "mine", str(folder_of(publish_run(words="one"))))
    folder = folder_of(publish_run(words="two"))
    promote(Store(), "mine", str(folder))
    return folder


def test_what_is_whole(folder: Path) -> None:
    checks = audit(Store(), "mine")
    assert all(check.passed for check in checks)
    assert promoted.find(Store(), "mine", None, where="").digest[:12] in {check.value for check in checks}


def test_a_file_changed_behind_its_size_and_time(folder: Path) -> None:
    path = folder / "model.safetensors"
    status = path.stat()
    path.write_text("owt")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ModelError, match="not what was promoted"):
        audit(Store(), "mine")
    rollback(Store(), "mine", 1, note="the folder was changed")
    assert all(check.passed for check in audit(Store(), "mine"))


def test_a_pointer_changed_by_hand_and_a_model_that_is_none(folder: Path, isolated_store: Path) -> None:
    path = isolated_store / "models" / "mine" / "pointer.json"
    path.write_text(path.read_text().replace('"current": 2', '"current": 1'))
    with pytest.raises(StoreError, match="changed by hand"):
        audit(Store(), "mine")
    with pytest.raises(ConfigError, match="no version yet"):
        audit(Store(), "yours")


def test_a_version_that_no_decision_made_current_is_named(folder: Path, isolated_store: Path) -> None:
    """As a promotion leaves it that was killed before it moved the pointer; so does a history whose end was cut off."""
    first = isolated_store / "models" / "mine" / "1.json"
    first.with_name("3.json").write_text(first.read_text().replace('"version": 1', '"version": 3'))
    (failed,) = [check for check in audit(Store(), "mine") if not check.passed]
    assert failed.value == "3"
