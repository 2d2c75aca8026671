"""A local file that changes while it is read is refused by name, before a row of the new content is given."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from posttrain_lib.data import readers
from posttrain_lib.data.sources import Place, iter_rows, read_from
from posttrain_lib.errors import DataError

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "file.arrow", "stream.arrow")
#: noise of one length, so that old and new have the same size
OLD, NEW = [[{"n": n, "v": v, "pad": os.urandom(400).hex()} for n in range(4000)] for v in ("old", "new")]


def contents(kind: str, rows: list[dict[str, Any]]) -> bytes:
    lines, out = "".join(json.dumps(row) + "\n" for row in rows).encode(), io.BytesIO()
    if kind.startswith("jsonl"):
        packed = {"jsonl.gz": gzip.compress, "jsonl.zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}
        return packed.get(kind, bytes)(lines)
    if kind == "json":
        return json.dumps(rows).encode()
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(table, out, row_group_size=100)
    else:
        with (pa.ipc.new_file if kind == "file.arrow" else pa.ipc.new_stream)(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return out.getvalue()


def rewritten(path: Path, content: bytes) -> None:
    with open(path, "r+b") as handle:
        handle.write(content)


def replaced(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


def grown(path: Path, _: bytes) -> None:
    with open(path, "ab") as handle:
        handle.write(b"\n")


def removed(path: Path, _: bytes) -> None:
    path.unlink()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [rewritten, replaced, grown, removed], ids=lambda change: change.__name__)
class TestEveryKind:
    @pytest.fixture
    def path(self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(readers, "_BLOCK", 1 << 16)  # many reads a file
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(contents(kind, OLD))
        os.utime(path, (1, 1))  # else both versions may be written within one tick of the file system's clock
        return path

    @pytest.mark.parametrize("after", [1, 2000])
    def test_a_change_between_rows(
        self, path: Path, kind: str, change: Callable[[Path, bytes], None], after: int
    ) -> None:
        reading = read_from(str(path))
        found = [next(reading)[2] for _ in range(after)]
        change(path, contents(kind, NEW))
        with pytest.raises(DataError, match="changed while it was read") as caught:
            found.extend(row for _, _, row in reading)
        assert caught.value.where == str(path)
        assert found == OLD[: len(found)]

    def test_a_change_behind_the_last_read(self, path: Path, kind: str, change: Callable[[Path, bytes], None]) -> None:
        """Every row is there by then; what was read is all the same not what the file has."""
        reading = read_from(str(path), Place(0))
        found = [next(reading)[2] for _ in OLD]
        change(path, contents(kind, NEW))
        with pytest.raises(DataError, match="changed while it was read"):
            next(reading)
        assert found == OLD


def test_a_reading_that_is_left_early_and_a_touched_mode_are_no_change(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(contents("jsonl", OLD))
    reading = read_from(str(path))
    next(reading)
    grown(path, b"")
    reading.close()
    whole = iter_rows(str(path))
    next(whole)
    path.chmod(0o600)
    assert sum(1 for _ in whole) == len(OLD) - 1
