"""The pointer to the current version: moved as one file, told when it was changed by hand, whatever the clock says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.errors import StoreError
from posttrain_lib.lineage import pointer
from posttrain_lib.lineage.pointer import Entry, TakenFile, TakenRows
from posttrain_lib.lineage.store import Store


def entry(version: int | None, action: pointer.Action = "promoted", at: str = "2026-03-01T03:00:00+00:00") -> Entry:
    return Entry(0, action, version, None, at, "ann", "because", "")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Versions 1 and 2 were promoted, then 1 was the current one again."""
    store = Store(tmp_path)
    found = pointer.Pointer(None)
    for each in (entry(1), entry(2), entry(1, "rolled back")):
        found = pointer.append(store, "mine", found, each)
    return store


def path(store: Store) -> Path:
    return store.root / "models" / "mine" / "pointer.json"


def change(store: Store, how: Any) -> None:
    raw = json.loads(path(store).read_text())
    how(raw)
    path(store).write_text(json.dumps(raw))


def test_entries_know_their_number_and_what_was_before(store: Store) -> None:
    found = pointer.read(store, "mine", [1, 2])
    assert found.current == 1
    assert [(e.number, e.before, e.version, e.action) for e in found.history] == [
        (1, None, 1, "promoted"), (2, 1, 2, "promoted"), (3, 2, 1, "rolled back")
    ]  # fmt: skip
    assert [e.previous for e in found.history] == ["", found.history[0].digest(), found.history[1].digest()]


def test_a_model_of_before_there_were_pointers_has_its_latest_version(tmp_path: Path) -> None:
    assert pointer.read(Store(tmp_path), "old", [1, 2]) == pointer.Pointer(2)
    assert pointer.read(Store(tmp_path), "none", []) == pointer.Pointer(None)


def test_a_current_version_set_by_hand_is_named_with_what_to_do(store: Store) -> None:
    change(store, lambda raw: raw.update(current=2))
    with pytest.raises(StoreError, match="changed by hand") as caught:
        pointer.read(store, "mine", [1, 2])
    assert "current: 2" in str(caught.value) and "--name mine --rollback 2" in str(caught.value)


@pytest.mark.parametrize(
    "how",
    [
        lambda raw: raw["history"][1]["entry"].update(why="something else"),
        lambda raw: raw["history"][1]["entry"].update(by="bob"),
        lambda raw: raw["history"].pop(1),
        lambda raw: raw["history"].insert(0, raw["history"][0]),
        lambda raw: raw["history"].reverse(),
        lambda raw: raw["history"][0].pop("digest"),
        lambda raw: raw["history"][0].update(entry=None),
        lambda raw: raw["history"][0]["entry"].update(more=1),
        lambda raw: raw.pop("current"),
    ],
)
def test_a_history_changed_by_hand_is_named(store: Store, how: Any) -> None:
    change(store, how)
    with pytest.raises(StoreError, match="changed by hand") as caught:
        pointer.read(store, "mine", [1, 2])
    assert str(path(store)) in str(caught.value) and "backup" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"current": 1, "history": {}}'])
def test_a_torn_file_is_named(store: Store, text: str) -> None:
    path(store).write_text(text)
    with pytest.raises(StoreError, match=r"changed by hand|can be read|no entry"):
        pointer.read(store, "mine", [1, 2])


def test_a_current_version_whose_entry_is_gone(store: Store) -> None:
    with pytest.raises(StoreError, match="no entry any more"):
        pointer.read(store, "mine", [2])


def test_the_order_is_that_of_the_entries_whatever_the_clock_said(store: Store) -> None:
    """A clock set back, and one that tells another zone's time: entries count by their numbers."""
    found = pointer.read(store, "mine", [1, 2])
    found = pointer.append(store, "mine", found, entry(2, "rolled back", at="2001-01-01T00:00:00+00:00"))
    found = pointer.append(store, "mine", found, entry(1, "rolled back", at="2026-10-25T02:30:00+02:00"))
    assert pointer.read(store, "mine", [1, 2]) == found and found.current == 1


def test_times_are_utc_with_their_offset_in_any_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "from posttrain_lib.lineage.pointer import utc_now; print(utc_now())"
    told = []
    for zone in ("UTC", "Pacific/Kiritimati", "America/St_Johns"):
        environment = {**os.environ, "TZ": zone}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        told.append(done.stdout.strip())
    assert all(each.endswith("+00:00") for each in told)
    assert len({each[:13] for each in told}) <= 2  # the hour, or two at its turn; the zones lie 17.5 hours apart


def test_a_writer_that_is_killed_leaves_the_pointer_as_it_was(store: Store) -> None:
    """It dies between writing the new file and renaming it."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from posttrain_lib.lineage import pointer\n"
        "from posttrain_lib.lineage.store import Store\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store = Store(Path(sys.argv[1]))\n"
        "found = pointer.read(store, 'mine', [1, 2])\n"
        "pointer.append(store, 'mine', found, found.history[1])\n"
    )
    before = path(store).read_bytes()
    done = subprocess.run([sys.executable, "-c", script, str(store.root)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert path(store).read_bytes() == before and pointer.read(store, "mine", [1, 2]).current == 1


def test_the_rows_that_a_retrain_took(store: Store) -> None:
    rows = TakenRows("mine", 1, (TakenFile("a.jsonl", 10, "0" * 64), TakenFile("b.jsonl", 9, "1" * 64, 4)))
    digest = pointer.keep_rows(store, rows)
    assert pointer.rows_of(store, "mine", digest) == rows and pointer.keep_rows(store, rows) == digest
    file = path(store).parent / "rows" / f"{digest}.json"
    file.write_text(file.read_text().replace("a.jsonl", "c.jsonl"))
    with pytest.raises(StoreError, match="changed by hand"):
        pointer.rows_of(store, "mine", digest)
    file.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        pointer.rows_of(store, "mine", digest)
