"""The ledger: a visit is settled once, and what was in flight at a kill is asked again."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from posttrain_lib.errors import CheckpointError
from posttrain_lib.rl.ledger import FATES, Ledger, Settled
from posttrain_lib.rl.version_log import VersionLog, read_log
from tests.support.ledgers import trained_visits


def settle(ledger: Ledger, visits: list[int], fate: str = "trained") -> None:
    ledger.settle(Settled(visit, f"s: {visit}", fate, "" if fate == "trained" else "why") for visit in visits)  # type: ignore[arg-type]


def test_visits_are_issued_in_order() -> None:
    ledger = Ledger()
    assert ledger.issue(3) == [0, 1, 2] and ledger.issue(2) == [3, 4]
    assert ledger.in_flight == {0, 1, 2, 3, 4}


def test_what_is_skipped_is_settled_and_never_in_flight() -> None:
    ledger = Ledger()
    skip = [Settled(visit, "p", "skipped", "solved") if visit % 2 else None for visit in range(10)]
    assert ledger.issue(3, skip.__getitem__) == [0, 2, 4] and ledger.in_flight == {0, 2, 4}
    assert ledger.counts["skipped"] == 2 and ledger.next == 5


def test_a_visit_cannot_be_settled_twice() -> None:
    ledger = Ledger()
    settle(ledger, ledger.issue(1))
    with pytest.raises(ValueError, match="was not in flight"):
        settle(ledger, [0])


def test_a_state_that_would_lose_visits_is_refused() -> None:
    ledger = Ledger()
    settle(ledger, ledger.issue(1))
    with pytest.raises(ValueError, match="would lose them"):
        ledger.state()
    ledger.close_update(1)
    assert ledger.state() == {
        "next": 1,
        "in_flight": [],
        "counts": {"trained": 1, "dropped": 0, "quarantined": 0, "skipped": 0},
    }


def test_random_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Updates of three visits, some dropped; checkpoints now and then; kills anywhere, also in the middle of a line."""
    draw = random.Random(0)
    log = tmp_path / "ledger.jsonl"
    ledger, version = Ledger(VersionLog(log)), 0
    saved = (ledger.state(), 0)
    for _ in range(400):
        visits = ledger.issue(3)
        if draw.random() < 0.15:  # killed with these in flight
            if draw.random() < 0.5:
                with open(log, "a", encoding="utf-8") as handle:
                    handle.write('{"version": 99, "tra')
            ledger, version = Ledger(VersionLog(log)), saved[1]
            ledger.load_state(saved[0], version)
            continue
        fates = [draw.choice(FATES) for _ in visits]
        for visit, fate in zip(visits, fates, strict=True):
            settle(ledger, [visit], fate)
        version += 1
        ledger.close_update(version)
        if draw.random() < 0.3:
            ledger.issue(2)  # asked ahead, and in flight when the checkpoint is made
            saved = (ledger.state(), version)
    lines = read_log(log)
    assert [line["version"] for line in lines] == list(range(1, version + 1))
    settled = sorted(visit[0] for line in lines for fate in FATES for visit in line[fate])
    assert len(settled) == len(set(settled)), "a visit counted twice"
    waiting = ledger.in_flight | set(ledger.state()["in_flight"])
    assert sorted([*settled, *waiting]) == list(range(ledger.next)), "a visit was lost"
    assert set(trained_visits(lines)) <= set(settled)


def test_a_log_that_was_cut_is_noticed(tmp_path: Path) -> None:
    log = tmp_path / "ledger.jsonl"
    ledger = Ledger(VersionLog(log))
    settle(ledger, ledger.issue(2))
    ledger.close_update(1)
    state = ledger.state()
    log.write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="different visits"):
        Ledger(VersionLog(log)).load_state(state, 1)


def test_without_a_log_a_run_goes_on_from_its_checkpoints_counts(tmp_path: Path) -> None:
    """Its checkpoints lie elsewhere, and the machine is another one."""
    here, there = (VersionLog(tmp_path / f"{name}.jsonl") for name in ("here", "there"))
    ledger = Ledger(here)
    settle(ledger, ledger.issue(2))
    ledger.close_update(1)
    ledger.issue(1)
    again = Ledger(there)
    told = again.load_state(ledger.state(), 1)
    assert told == "there.jsonl is not here: it begins anew, and only counts the 2 prompts before"
    assert again.issue(2) == [2, 3], "the one in flight, and the next"
    settle(again, [2, 3])
    again.close_update(2)
    assert [line["trained"] for line in read_log(there.path)] == [[], [[2, "s: 2"], [3, "s: 3"]]]
    assert Ledger(there).load_state(again.state(), 2) == "", "its counts and lines are all there is"
    there.path.write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="different visits"):
        Ledger(there).load_state(again.state(), 2)


def test_a_run_without_a_checkpoint_begins_with_an_empty_log(tmp_path: Path) -> None:
    """Killed before its first checkpoint, it had settled visits already."""
    log = tmp_path / "ledger.jsonl"
    ledger = Ledger(VersionLog(log))
    settle(ledger, ledger.issue(2))
    ledger.close_update(1)
    again = Ledger(VersionLog(log))
    again.begin()
    assert read_log(log) == []
    settle(again, again.issue(2))
    again.close_update(1)
    state = again.state()
    Ledger(VersionLog(log)).load_state(state, 1)


@pytest.mark.parametrize("damage", [b"\0" * 15, b'{"version": 1.', b"\xff" * 15])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    log = VersionLog(tmp_path / "log.jsonl")
    log.path.write_bytes(b'{"version": 1}\n' + damage + b'\n{"version": 3}\n')
    with pytest.raises(CheckpointError, match=r"log\.jsonl, line 2"):
        log.start(3)


def test_lines_are_on_the_disk_as_the_checkpoint_is_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a run would else find its checkpoint, and no log that fits it."""
    flushed: dict[int, int] = {}
    flush = os.fsync

    def noted(descriptor: int) -> None:
        flush(descriptor)
        found = os.fstat(descriptor)
        flushed[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", noted)
    log = VersionLog(tmp_path / "log.jsonl")
    ledger = Ledger(log)
    ledger.begin()
    for version in (1, 2):
        settle(ledger, ledger.issue(2))
        ledger.close_update(version)
    state = ledger.state()
    for _ in range(2):
        found = log.path.stat()
        assert flushed[found.st_ino] == found.st_size > 0
        assert tmp_path.stat().st_ino in flushed, "its name"
        Ledger(log).load_state(state, 2)


def test_a_kill_may_tear_a_line_anywhere(tmp_path: Path) -> None:
    """Within a letter of several bytes, too."""
    log = VersionLog(tmp_path / "log.jsonl")
    log.start(0)
    log.append([{"version": 1, "answer": "één"}])
    whole = log.path.read_bytes()
    log.append([{"version": 2, "answer": "één"}])
    second = log.path.read_bytes()[len(whole) :]
    assert any(byte > 127 for byte in second), "the test needs letters of several bytes"
    for length in range(len(second)):
        log.path.write_bytes(whole + second[:length])
        assert log.start(1) == [{"version": 1, "answer": "één"}] == log.start(2)
        assert log.path.read_bytes() == whole
