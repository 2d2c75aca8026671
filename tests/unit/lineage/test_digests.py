"""Digests depend on content and names, and remembered ones are never stale."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.lineage.digests import FileDigests, digest_file, digest_value, list_files, write_atomically


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_value_digest_ignores_key_order(value: dict[str, object]) -> None:
    assert digest_value(value) == digest_value(dict(reversed(list(value.items()))))


def test_folder_digest_changes_with_content_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = FileDigests().path(folder)
    (folder / "a").write_text("2")
    second = FileDigests().path(folder)
    (folder / "a").rename(folder / "b")
    assert len({first, second, FileDigests().path(folder)}) == 3


def test_what_lies_behind_a_link_to_a_folder_counts(tmp_path: Path) -> None:
    """As templates that several models of one family share. A link to where it stands leads nowhere new."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "template.jinja").write_text("one")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "templates").symlink_to(tmp_path / "shared")
    (tmp_path / "model" / "itself").symlink_to(tmp_path / "model")
    assert [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path / "model")] == [
        "model/config.json",
        "model/templates/template.jinja",
    ]
    before = FileDigests().path(tmp_path / "model")
    (tmp_path / "shared" / "template.jinja").write_text("two")
    assert FileDigests().path(tmp_path / "model") != before


def test_memory_is_used_and_refreshed(tmp_path: Path) -> None:
    path, memory = tmp_path / "data", tmp_path / "memory.json"
    path.write_text("one")
    digests = FileDigests(memory)
    digests.path(path)
    digests.save()
    path.write_text("two!")
    os.utime(path, ns=(1, 1))
    assert FileDigests(memory).path(path) == digest_file(path)


def test_a_torn_memory_is_rebuilt(tmp_path: Path) -> None:
    path, memory = tmp_path / "data", tmp_path / "memory.json"
    path.write_text("one")
    memory.write_text('{"half')
    assert FileDigests(memory).path(path) == digest_file(path)


def test_another_file_of_the_same_size_and_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives and copies set times: two versions of a file may have one."""
    path, other, memory = tmp_path / "data", tmp_path / "other", tmp_path / "memory.json"
    for file, text in ((path, "one"), (other, "two")):
        file.write_text(text)
        os.utime(file, ns=(10**18, 10**18))
    monkeypatch.setattr(time, "time_ns", lambda: 2**62)  # long after
    digests = FileDigests(memory)
    digests.file(path)
    digests.save()
    os.replace(other, path)
    assert FileDigests(memory).file(path) == digest_file(path)
    path.write_text("six")
    os.utime(path, ns=(10**18, 10**18))
    assert FileDigests(memory).file(path) == digest_file(path)


def test_a_file_that_just_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second change within a tick of the disk's clock leaves size and times as they were."""
    path, read = tmp_path / "data", list[Path]()
    path.write_text("one")
    monkeypatch.setattr(time, "time_ns", lambda: path.stat().st_ctime_ns)
    monkeypatch.setattr("posttrain_lib.lineage.digests.digest_file", lambda file: read.append(file) or "digest")
    digests = FileDigests()
    digests.file(path)
    digests.file(path)
    assert len(read) == 2


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, memory = tmp_path / "data", tmp_path / "memory.json"
    path.write_text("one")
    monkeypatch.setattr(time, "time_ns", lambda: 2**62)  # long after
    digests = FileDigests(memory)
    known = digests.file(path)
    digests.save()
    monkeypatch.setattr("posttrain_lib.lineage.digests.digest_file", lambda _: pytest.fail("read again"))
    assert FileDigests(memory).file(path) == known


def test_threads_may_write_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, both, flush = tmp_path / "file", threading.Barrier(2), os.fsync

    def together(handle: int) -> None:
        flush(handle)
        both.wait(timeout=60)

    monkeypatch.setattr(os, "fsync", together)
    texts = ["a" * 10, "b" * 10]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda text: write_atomically(path, text), texts))
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(path, "text")
    assert list(tmp_path.iterdir()) == [path]
