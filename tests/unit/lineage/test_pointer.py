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


def test_a_pointer_that_is_gone_makes_no_version_the_current_one(store: Store) -> None:
    path(store).unlink()
    with pytest.raises(StoreError, match="pointer of a promoted model is gone") as caught:
        pointer.read(store, "mine", [1, 2])
    assert "versions 1, 2" in str(caught.value) and "--name mine --rollback VERSION --note WHY" in str(caught.value)
    assert pointer.read(store, "mine", [1, 2], settling=True) == pointer.Pointer(None)
    assert pointer.read(store, "none", []) == pointer.Pointer(None)


def test_a_history_that_begins_anew_is_not_held_to_the_lost_one(store: Store) -> None:
    path(store).unlink()
    found = pointer.append(store, "mine", pointer.Pointer(None), entry(2, "rolled back"))
    assert pointer.read(store, "mine", [1, 2]) == found and found.current == 2
    assert pointer.newest_noted(store, "mine") == 1


FORMAT_1 = {
    "current": 2,
    "history": [
        {
            "digest": digest,
            "entry": {
                "number": number, "action": "promoted", "version": number, "before": number - 1 or None,
                "at": "2026-03-01T03:00:00+00:00", "by": "ann", "why": "because", "previous": previous, "run": None,
                "candidate": None, "rows": None, "gates": [],
            },
        }
        for number, digest, previous in (
            (1, "e680bb7785307daf8e3743a265a1371822760926e06daac96c36fb69aff6d9d3", ""),
            (
                2,
                "7833c2ea172cfc4962027f4d5d40ef8c3dbfe561ce229e19358869adf3de4e1a",
                "e680bb7785307daf8e3743a265a1371822760926e06daac96c36fb69aff6d9d3",
            ),
        )
    ],
}  # fmt: skip


def test_a_file_of_format_1_is_read_and_written_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path(store).parent.mkdir(parents=True)
    path(store).write_text(json.dumps(FORMAT_1))
    found = pointer.read(store, "mine", [1, 2])
    assert found.current == 2 and found.records == {} and found.with_entry == {1, 2}
    assert pointer.newest_noted(store, "mine") is None
    found = pointer.append(store, "mine", found, entry(1, "rolled back"))
    assert pointer.read(store, "mine", [1, 2]) == found and json.loads(path(store).read_text())["format_version"] == 2


def test_a_file_of_a_later_format_is_refused(store: Store) -> None:
    change(store, lambda raw: raw.update(format_version=3))
    with pytest.raises(StoreError, match="newer version of this project"):
        pointer.read(store, "mine", [1, 2])


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_history_cut_at_its_end_is_named(store: Store, left: int) -> None:
    def cut(raw: Any) -> None:
        del raw["history"][left:]
        raw["current"] = left or None

    change(store, cut)
    with pytest.raises(StoreError, match="cut off at its end") as caught:
        pointer.read(store, "mine", [1, 2], settling=True)
    assert f"{left} entries" in str(caught.value) and "entry 3" in str(caught.value)


def test_an_end_that_was_replaced_is_named(store: Store) -> None:
    found = pointer.read(store, "mine", [1, 2])
    newest = path(store).with_name(pointer.NEWEST)
    noted = newest.read_text()
    pointer.append(store, "mine", pointer.Pointer(2, found.history[:2]), entry(2, "rejected"))
    newest.write_text(noted)
    with pytest.raises(StoreError, match="cut off at its end"):
        pointer.read(store, "mine", [1, 2])


def test_a_note_that_lags_is_no_damage_and_a_torn_one_is_named(store: Store) -> None:
    newest = path(store).with_name(pointer.NEWEST)
    noted = newest.read_text()
    found = pointer.append(store, "mine", pointer.read(store, "mine", [1, 2]), entry(2, "rolled back"))
    newest.write_text(noted)  # as a writer leaves it that was killed between the two files
    assert pointer.read(store, "mine", [1, 2]) == found
    newest.write_text(noted[:10])
    with pytest.raises(StoreError, match="damaged and cannot be read"):
        pointer.read(store, "mine", [1, 2])


def test_a_note_that_cannot_be_written_is_told_and_the_decision_stands(store: Store) -> None:
    """Who reads of a failure must not take the version before for the current one."""
    before = pointer.read(store, "mine", [1, 2])
    path(store).with_name("newest.json").unlink()
    path(store).with_name("newest.json").mkdir()
    with pytest.raises(StoreError, match="the decision was written and stands"):
        pointer.append(store, "mine", before, entry(2, "rolled back"))
    assert pointer.read(store, "mine", [1, 2]).current == 2


def test_a_current_version_set_by_hand_is_named_with_what_to_do(store: Store) -> None:
    change(store, lambda raw: raw.update(current=2))
    with pytest.raises(StoreError, match="changed by hand") as caught:
        pointer.read(store, "mine", [1, 2])
    assert "current: 2" in str(caught.value) and "--name mine --rollback 2 --note WHY" in str(caught.value)
    found = pointer.read(store, "mine", [1, 2], settling=True)
    assert found.current is None and len(found.history) == 3


@pytest.mark.parametrize(
    "how",
    [
        lambda raw: raw["history"][1]["entry"].update(why="something else"),
        lambda raw: raw["history"][1]["entry"].update(by="bob"),
        lambda raw: raw["history"].pop(1),
        lambda raw: raw["history"].insert(0, raw["history"][0]),
        lambda raw: raw["history"].reverse(),
    ],
)
def test_a_history_changed_by_hand_is_named(store: Store, how: Any) -> None:
    change(store, how)
    with pytest.raises(StoreError, match="changed by hand") as caught:
        pointer.read(store, "mine", [1, 2], settling=True)
    assert str(path(store)) in str(caught.value) and "backup" in str(caught.value)


@pytest.mark.parametrize(
    "how",
    [
        lambda raw: raw["history"][0].pop("digest"),
        lambda raw: raw["history"][0].update(entry=None),
        lambda raw: raw["history"][0]["entry"].update(more=1),
        lambda raw: raw.pop("current"),
    ],
)
def test_a_history_of_another_shape_is_called_damaged(store: Store, how: Any) -> None:
    change(store, how)
    with pytest.raises(StoreError, match="damaged and cannot be read"):
        pointer.read(store, "mine", [1, 2])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"current": 1, "history": {}}', '{"current": 1, "histor'])
def test_a_torn_file_is_called_damaged(store: Store, text: str) -> None:
    path(store).write_text(text)
    with pytest.raises(StoreError, match=r"is damaged|cut off") as caught:
        pointer.read(store, "mine", [1, 2])
    assert "by hand" not in str(caught.value)


def test_a_current_version_whose_entry_is_gone(store: Store) -> None:
    with pytest.raises(StoreError, match="no record any more"):
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
