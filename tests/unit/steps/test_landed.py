"""What is new in a folder: by content, each file once, and named where it was changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from posttrain_lib.config.retrain import GeneratedRows
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests
from posttrain_lib.lineage.pointer import TakenFile
from posttrain_lib.lineage.store import Store
from steps import landed
from steps.base import run_step
from steps.landed import STEP, RowsToTake, land_generated, new_files
from tests.support.s3 import s3_environment, s3_server


def write(path: Path, *rows: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows) + end)
    return path


def take(folder: Any, files: tuple[TakenFile, ...]) -> Path:
    manifest = run_step(STEP, RowsToTake(str(folder), files), {}, say=lambda _: None)  # type: ignore[arg-type]
    return Path(manifest.outputs["rows"].uri)


@pytest.fixture
def folder(tmp_path: Path, isolated_store: Path) -> Path:
    folder = tmp_path / "landing"
    write(folder / "2026-03-01.jsonl", "one", "two")
    write(folder / "more" / "2026-03-02.jsonl", "three")
    return folder


def test_what_was_taken_is_not_new_whatever_its_time(folder: Path) -> None:
    found = new_files(str(folder), (), "stop")
    assert [file.path for file in found.files] == ["2026-03-01.jsonl", "more/2026-03-02.jsonl"] and not found.remarks
    os.utime(folder / "2026-03-01.jsonl", (4e9, 4e9))
    assert new_files(str(folder), found.files, "stop").files == ()
    write(folder / "2026-01-01.jsonl", "a day that came late")
    assert [file.path for file in new_files(str(folder), found.files, "stop").files] == ["2026-01-01.jsonl"]


def test_the_copy_has_the_rows_and_stays_what_it_was(folder: Path) -> None:
    found = new_files(str(folder), (), "stop")
    rows = take(folder, found.files)
    assert (rows / "more" / "2026-03-02.jsonl").read_text() == '{"text": "three"}\n'
    write(folder / "2026-03-01.jsonl", "changed")
    assert "two" in (rows / "2026-03-01.jsonl").read_text()


def test_the_same_content_under_another_name_is_not_taken_twice(folder: Path) -> None:
    taken = new_files(str(folder), (), "stop").files
    write(folder / "copy.jsonl", "three")
    write(folder / "x.jsonl", "new")
    write(folder / "y.jsonl", "new")
    found = new_files(str(folder), taken, "stop")
    assert [file.path for file in found.files] == ["x.jsonl"]
    assert [remark.split(" ")[0] for remark in found.remarks] == ["copy.jsonl", "y.jsonl"]
    assert "more/2026-03-02.jsonl" in found.remarks[0]


@pytest.mark.parametrize("end", ["\n", ""], ids=["whole line", "no newline at the end"])
def test_of_a_file_that_grew_the_new_lines_are_taken(folder: Path, end: str) -> None:
    path = write(folder / "2026-03-01.jsonl", "one", "two", end=end)
    taken = new_files(str(folder), (), "stop").files
    with open(path, "a") as handle:
        handle.write(("" if end else "\n") + '{"text": "late"}\n')
    found = new_files(str(folder), taken, "stop")
    assert "grew" in found.remarks[0] and found.files[0].first_byte == taken[0].size
    (copied,) = [file for file in take(folder, found.files).rglob("*") if file.is_file()]
    assert copied.read_text().split() == ['{"text":', '"late"}'] and "from-byte" in copied.name
    assert new_files(str(folder), (*taken, *found.files), "stop").files == ()


@pytest.mark.parametrize("rows", [("one", "TWO"), ("one",), ("zero", "one", "two", "three")])
def test_a_changed_file_is_named(folder: Path, rows: tuple[str, ...]) -> None:
    taken = new_files(str(folder), (), "stop").files
    write(folder / "2026-03-01.jsonl", *rows)
    with pytest.raises(DataError, match=r"changed after a retrain had taken them") as caught:
        new_files(str(folder), taken, "stop")
    assert "2026-03-01.jsonl" in str(caught.value) and "landing.changed: take" in str(caught.value)
    again = new_files(str(folder), taken, "take")
    assert [file.path for file in again.files] == ["2026-03-01.jsonl"] and "taken again" in again.remarks[0]


def test_a_line_that_was_torn_when_it_was_taken_and_is_whole_now_is_a_change(folder: Path) -> None:
    path = folder / "2026-03-01.jsonl"
    path.write_text('{"text": "on')
    taken = new_files(str(folder), (), "stop").files
    path.write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="changed after"):
        new_files(str(folder), taken, "stop")


def test_days_without_rows(tmp_path: Path, isolated_store: Path) -> None:
    with pytest.raises(DataError, match="not there"):
        new_files(str(tmp_path / "nowhere"), (), "stop")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert new_files(str(empty), (), "stop").files == ()
    (empty / ".b.jsonl").write_text('{"text": "half')  # being written
    assert new_files(str(empty), (), "stop").files == ()
    (empty / "a.jsonl").touch()
    found = new_files(str(empty), (), "stop")
    assert found.files == () and found.remarks == ("a.jsonl is empty: not taken",)


def test_a_file_changed_between_look_and_copy_is_named(folder: Path) -> None:
    found = new_files(str(folder), (), "stop")
    path = folder / "2026-03-01.jsonl"
    path.write_text(path.read_text().replace("one", "ONE"))
    with pytest.raises(DataError, match="changed while it was taken"):
        take(folder, found.files)


def test_a_file_that_lands_while_the_folder_is_looked_at_is_the_next_looks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = landed.known_digests

    def known_digests() -> FileDigests:  # asked for between the two listings
        write(folder / "2026-03-03.jsonl", "late")
        return real()

    monkeypatch.setattr(landed, "known_digests", known_digests)
    first = new_files(str(folder), (), "stop").files
    assert [file.path for file in first] == ["2026-03-01.jsonl", "more/2026-03-02.jsonl"]
    assert [file.path for file in new_files(str(folder), first, "stop").files] == ["2026-03-03.jsonl"]


def test_a_datasets_folder_is_no_landing(folder: Path) -> None:
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    with pytest.raises(DataError, match="is a datasets folder"):
        new_files(str(folder), (), "stop")


def test_rows_that_land_by_themselves(isolated_store: Path) -> None:
    wanted = GeneratedRows(rows=10, seed=5)
    folder = Path(land_generated(Store(), "mine", wanted, ()))
    land_generated(Store(), "mine", wanted, ())  # nothing was taken: nothing more lands
    assert [path.name for path in folder.iterdir()] == ["rows-00001.jsonl"]
    taken = new_files(str(folder), (), "stop").files
    land_generated(Store(), "mine", wanted, taken)
    first, second = sorted(folder.iterdir())
    assert second.name == "rows-00002.jsonl" and first.read_text() != second.read_text()


def test_rows_in_an_object_store(isolated_store: Path) -> None:
    with s3_server() as url, s3_environment(url):
        s3 = fsspec.filesystem("s3")
        s3.mkdir("landing")
        assert new_files("s3://landing/rows", (), "stop").files == ()
        s3.pipe("landing/rows/a.jsonl", b'{"text": "one"}\n')
        found = new_files("s3://landing/rows", (), "stop")
        assert [file.path for file in found.files] == ["a.jsonl"]
        assert (take("s3://landing/rows", found.files) / "a.jsonl").read_text() == '{"text": "one"}\n'
        s3.pipe("landing/rows/b.jsonl", b'{"text": "two"}\n')
        assert [file.path for file in new_files("s3://landing/rows", found.files, "stop").files] == ["b.jsonl"]
        s3.pipe("landing/rows/a.jsonl", b'{"text": "changed"}\n')
        with pytest.raises(DataError, match="changed after"):
            new_files("s3://landing/rows", found.files, "stop")


def test_what_happens_to_files_in_an_object_store_is_told_by_content_too(isolated_store: Path) -> None:
    one, two, late = (json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two", "late"))
    with s3_server() as url, s3_environment(url):
        s3 = fsspec.filesystem("s3")
        s3.mkdir("landing")
        s3.pipe({"landing/rows/a.jsonl": one, "landing/rows/b.jsonl": two})
        taken = new_files("s3://landing/rows", (), "stop").files
        s3.pipe({"landing/rows/a.jsonl": one, "landing/rows/c.jsonl": two})  # written again; copied
        found = new_files("s3://landing/rows", taken, "stop")
        assert not found.files and found.remarks[0].startswith("c.jsonl has the content of b.jsonl")
        s3.pipe("landing/rows/b.jsonl", two + late)
        found = new_files("s3://landing/rows", taken, "stop")
        assert [(file.path, file.first_byte) for file in found.files] == [("b.jsonl", len(two))]
        (copied,) = [path for path in take("s3://landing/rows", found.files).rglob("*") if path.is_file()]
        assert copied.read_bytes() == late
        assert new_files("s3://landing/rows", (*taken, *found.files), "stop").files == ()


def test_a_file_of_an_object_store_is_read_once_while_it_stays(
    isolated_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = landed.digest_of_first
    monkeypatch.setattr(landed, "digest_of_first", lambda file, size: read.append(file) or digest(file, size))
    with s3_server() as url, s3_environment(url):
        s3 = fsspec.filesystem("s3")
        s3.mkdir("landing")
        for name in ("a", "b"):
            s3.pipe(f"landing/rows/{name}.jsonl", json.dumps({"text": name}).encode())
            new_files("s3://landing/rows", (), "stop")
        s3.pipe("landing/rows/b.jsonl", b'{"text": "other"}')
        new_files("s3://landing/rows", (), "stop")
    assert [file.rpartition("/")[2] for file in read] == ["a.jsonl", "b.jsonl", "b.jsonl"]


@pytest.mark.parametrize("extra", [0, 1])
def test_growth_is_seen_where_blocks_of_reading_end(
    folder: Path, isolated_store: Path, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    path = folder / "2026-03-01.jsonl"
    monkeypatch.setattr(landed, "_BLOCK", path.stat().st_size // 2 + extra)
    taken = new_files(str(folder), (), "stop").files
    with open(path, "a") as handle:
        handle.write('{"text": "late"}\n')
    found = new_files(str(folder), taken, "stop")
    assert [file.first_byte for file in found.files] == [taken[0].size]
