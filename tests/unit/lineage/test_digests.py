"""Digests depend on content and names, and remembered ones are never stale."""

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.lineage.digests import FileDigests, digest_file, digest_value


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
