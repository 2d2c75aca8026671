"""Which settings differ, said by their keys."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from steps.unfinished import RECORD, differences, left_behind, record, told


def test_differences_are_named_by_their_keys() -> None:
    before = {"train": {"seed": 7, "steps": 10, "loss": None}, "gone": 1}
    after = {"train": {"seed": 11, "steps": 10, "loss": "sft"}, "new": [1, 2]}
    assert list(differences(before, after)) == [
        "train.seed 7 -> 11",
        'train.loss null -> "sft"',
        "gone 1 -> (none)",
        "new (none) -> [1, 2]",
    ]
    assert list(differences(before, before)) == []


def test_rows_that_begin_with_a_name_are_told_by_it() -> None:
    """As the files that step take_rows has for its settings."""
    before, after = [["a.jsonl", 0, 12], ["b.jsonl", 0, 3]], [["b.jsonl", 3, 9], ["c.jsonl", 0, 5]]
    assert list(differences(before, after)) == [
        "a.jsonl [0, 12] -> (none)",
        "b.jsonl [0, 3] -> [3, 9]",
        "c.jsonl (none) -> [0, 5]",
    ]
    assert list(differences({"files": before}, {"files": []})) == [
        "files.a.jsonl [0, 12] -> (none)",
        "files.b.jsonl [0, 3] -> (none)",
    ]


def test_settings_that_are_no_mapping_have_a_name() -> None:
    assert list(differences(None, [1])) == ["config null -> [1]"]


def test_a_line_names_a_few() -> None:
    line = told(differences({}, {str(number): "x" * 99 for number in range(6)}))
    assert line.endswith(" and 2 more") and line.count(" -> ") == 4 and len(line) < 250


def test_work_of_other_settings_is_told_once_and_own_work_never(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    assert left_behind(own, {"seed": 1}) is None, "nothing is there"
    record(other, {"seed": 2})
    line = left_behind(own, {"seed": 1})
    assert line is not None and "seed 2 -> 1" in line and str(other) in line
    record(own, {"seed": 1})
    assert left_behind(own, {"seed": 1}) is None


def test_work_that_another_run_ends_meanwhile_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of for the user's sake: no reason for a run to fail."""
    kept, gone = tmp_path / "kept", tmp_path / "gone"
    record(kept, {"seed": 2})
    record(gone, {"seed": 3})
    os.utime(kept / RECORD, (1, 1))
    read = Path.read_text

    def read_text(path: Path, **options: str) -> str:
        shutil.rmtree(gone, ignore_errors=True)
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    line = left_behind(tmp_path / "own", {"seed": 1})
    assert line is not None and "seed 2 -> 1" in line
