"""Reading goes on at any place, and what bytes in the wild do to rows."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain_lib.data import readers
from posttrain_lib.data.sources import BadRow, Place, digest_rows, files_of, iter_rows, pinned, read_from
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests

BOM = b"\xef\xbb\xbf"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
#: every row has the same fields, or Arrow could not store it as it is
rows_strategy = st.lists(
    st.fixed_dictionaries({"n": st.integers(-(2**53), 2**53), "text": texts, "list": st.lists(texts, max_size=3)}),
    min_size=1,
    max_size=30,
)
#: what may stand between rows of JSON lines
separators = st.lists(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \t\n", b"\n{broken\n", b"\n" + BOM]), min_size=30)


def json_lines(rows: list[dict[str, Any]], between: list[bytes]) -> bytes:
    lines = [json.dumps(row, ensure_ascii=index % 2 == 0).encode() for index, row in enumerate(rows)]
    return b"".join(line + separator for line, separator in zip(lines, between, strict=False))


def contents(kind: str, rows: list[dict[str, Any]], between: list[bytes], group: int) -> bytes:
    lines, out = json_lines(rows, between), io.BytesIO()
    if kind == "jsonl":
        return lines
    if kind == "jsonl.gz":  # two streams in one file, as appending leaves them
        return gzip.compress(lines[: len(lines) // 2]) + gzip.compress(lines[len(lines) // 2 :])
    if kind == "jsonl.zst":
        halves = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        return b"".join(pa.compress(half, codec="zstd", asbytes=True) for half in halves)
    if kind == "json":
        return json.dumps(rows, indent=group % 3 or None, ensure_ascii=group % 2 == 0).encode()
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(table, out, row_group_size=group)
    else:
        new = pa.ipc.new_file if kind == "file.arrow" else pa.ipc.new_stream
        with new(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=group)
    return out.getvalue()


KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "file.arrow", "stream.arrow")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_strategy, between=separators, group=st.integers(1, 9))
def test_reading_goes_on_at_any_place(
    kind: str, tmp_path: Path, rows: list[dict[str, Any]], between: list[bytes], group: int
) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(contents(kind, rows, between, group))
    [file] = files_of(str(path))
    everything = list(read_from(file))
    assert [(row_id, row) for _, row_id, row in everything] == list(iter_rows(str(path)))
    assert [row for _, _, row in everything if not isinstance(row, BadRow)] == rows
    for number, (place, _, _) in enumerate(everything):
        assert place.row == number
        assert list(read_from(file, place)) == everything[number:]
        # A place without its bytes is found by counting.
        assert list(read_from(file, Place(number))) == everything[number:]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.recursive(st.none() | st.booleans() | st.integers() | texts, st.lists, max_leaves=20),
    block=st.integers(1, 9),
)
def test_an_array_is_read_alike_in_windows_of_any_size(
    rows: Any, block: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([rows, {"a": rows}, 12, -1.5e3, {}], ensure_ascii=False), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(readers, "_BLOCK", block)
        found = [row for _, row in iter_rows(str(path))]
    assert [json.loads(row.raw) if isinstance(row, BadRow) else row for row in found] == json.loads(path.read_text())


@pytest.mark.parametrize(
    "text", ['[{"a": 1}', '[{"a": 1},]', '[{"a": 1}] x', '[{"a": 1} {}]', '[{"a": 1}, {"b": "\\', "["]
)
def test_a_broken_array_gives_what_stands_before_and_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    found = []
    with pytest.raises(DataError, match="does not end as one") as caught:
        found.extend(row for _, row in iter_rows(str(tmp_path / "rows.json")))
    assert found == ([{"a": 1}] if len(text) > 1 else [])
    assert "rows.json" in str(caught.value.where)


@pytest.mark.parametrize(
    "broken", ['{"a": nope}', '{"a" 1}', '{"a": "\\x"}', '{"a": "\n"}', "{1: 2}", '{"a": 1,}', "[1 2]"]
)
def test_a_broken_element_is_told_before_the_rest_is_read(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},' + broken + "," + ",".join(['{"x": "%s"}' % ("y" * 1000)] * 20_000) + "]")
    reading = read_from(str(path))
    assert next(reading)[2] == {"a": 1}
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="does not end as one"):
            next(reading)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A few windows as bytes and as text; the file has 80 times as many bytes as a window.
    assert peak < 8 * readers._BLOCK < path.stat().st_size / 8


@pytest.mark.parametrize(
    "element",
    ['"\\ud83d\\ude00"', '"\\u00e9"', '"\\\\"', "-Infinity", "-1.25e+17", "false", '{"a": [{}, "b"], "c": null}'],
)
def test_an_element_may_be_cut_anywhere_by_the_window(
    tmp_path: Path, element: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind 100 characters, so that the place of a cut is what decides, not the shortness of the text."""
    path = tmp_path / "rows.json"
    key = "k" * 100
    path.write_text(f'[{{"{key}": {element}}}, 7]')
    for block in range(100, len(path.read_text()) + 1):
        monkeypatch.setattr(readers, "_BLOCK", block)
        assert next(row for _, row in iter_rows(str(path))) == {key: json.loads(element)}


def test_a_folder_of_datasets_is_entered_at_a_row(tmp_path: Path) -> None:
    import datasets

    rows = [{"n": number, "text": str(number)} for number in range(2500)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert files_of(str(tmp_path / "saved")) == [str(tmp_path / "saved")]
    everything = list(read_from(str(tmp_path / "saved")))
    assert [row for _, _, row in everything] == rows and everything[1][1] == "saved:2"
    for number in (0, 833, 834, 1700, 2499):
        assert list(read_from(str(tmp_path / "saved"), everything[number][0])) == everything[number:]


@pytest.mark.parametrize("kind", ["folder", "parquet", "arrow"])
def test_objects_that_datasets_keeps_as_json_text(tmp_path: Path, kind: str) -> None:
    import datasets

    rows = [{"arguments": {"city": "Rome"}}, {"arguments": {"x": [1, {"y": "z"}]}}]
    made = datasets.Dataset.from_list(rows, features=datasets.Features({"arguments": datasets.Json()}))
    path = tmp_path / "saved"
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        made.to_parquet(str(path))
    else:
        made.save_to_disk(str(path))
        path = next(path.glob("*.arrow")) if kind == "arrow" else path
    assert [row for _, row in iter_rows(str(path))] == rows


def test_a_cut_stream_gives_whole_rows_only_and_is_named(tmp_path: Path) -> None:
    rows = [{"n": number} for number in range(50_000)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, whole in (
        ("rows.jsonl.gz", gzip.compress(lines)),
        ("rows.jsonl.zst", pa.compress(lines, codec="zstd", asbytes=True)),
    ):
        for length in (len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:length])
            found: list[Any] = []
            with pytest.raises(DataError, match="cannot be read") as caught:
                found.extend(row for _, row in iter_rows(str(tmp_path / name)))
            assert name in str(caught.value.where)
            assert 0 < len(found) < len(rows) and found == rows[: len(found)]


@pytest.mark.parametrize(("made", "said"), [("cut", "has no end mark"), ("joined", "more behind the end")])
def test_a_stream_of_arrow_that_ends_where_a_batch_ends_is_named(tmp_path: Path, made: str, said: str) -> None:
    """Arrow's reader gives the rows up to there, and says nothing."""
    table, sink = pa.table({"n": range(40)}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
        at_end_of_a_batch = sink.tell()
    whole = sink.getvalue().to_pybytes()
    (tmp_path / "rows.arrow").write_bytes(whole[:at_end_of_a_batch] if made == "cut" else whole + whole)
    found: list[Any] = []
    with pytest.raises(DataError, match=said) as caught:
        found.extend(row for _, row in iter_rows(str(tmp_path / "rows.arrow")))
    assert "rows.arrow" in str(caught.value.where) and found == [{"n": number} for number in range(40)]


def test_damage_in_a_stream_is_found_by_its_checksum(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b'{"n": 1}\n' * 100))
    whole[-6] ^= 1  # in the checksum: every row decompresses
    (tmp_path / "rows.jsonl.gz").write_bytes(whole)
    with pytest.raises(DataError, match="incorrect data check"):
        list(iter_rows(str(tmp_path / "rows.jsonl.gz")))


def test_bytes_in_the_wild(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(
        BOM + b'{"a": 1}\r\n\r\n \n' + BOM + b'{"a": "\xc3\x28"}\n{"a": 2}\r\n{"a": 3}'
    )
    found = list(iter_rows(str(tmp_path / "rows.jsonl")))
    assert [row_id for row_id, _ in found] == [f"rows.jsonl:{number}" for number in (1, 4, 5, 6)]
    assert [row for _, row in found if not isinstance(row, BadRow)] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert isinstance(found[1][1], BadRow) and found[1][1].reason == "not_utf8"


@pytest.mark.parametrize("content", [b"", BOM, b"\n\r\n \n", BOM + b"\n"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "ndjson"])
def test_a_file_without_rows_is_named(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    with pytest.raises(DataError, match="no rows") as caught:
        list(iter_rows(str(path)))
    assert str(path) in str(caught.value)


def test_links_are_followed_and_an_unreadable_folder_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jsonl").write_text("{}\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "b.jsonl").symlink_to(tmp_path / "real" / "a.jsonl")
    assert [row_id for row_id, _ in iter_rows(str(tmp_path / "linked"))] == ["b.jsonl:1"]
    assert len(digest_rows(pinned(str(tmp_path / "linked")), FileDigests())) == 64
    with pytest.raises(DataError, match="no file matches"):
        files_of(str(tmp_path / "nothing" / "*.jsonl"))


def test_a_file_whose_name_is_no_utf_8_is_named(tmp_path: Path) -> None:
    """As archives of other systems unpack it. Row ids are written into files of UTF-8."""
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "w") as handle:
        handle.write('{"n": 2}\n')
    with pytest.raises(DataError, match="no UTF-8") as caught:
        digest_rows(str(tmp_path), FileDigests())
    assert str(caught.value.got).endswith(r"/caf\xe9.jsonl")
    assert [row for _, row in iter_rows(f"{tmp_path}/a*")] == [{"n": 1}]


def test_a_folder_below_that_cannot_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    class OneShut(LocalFileSystem):
        """Somebody else's folder, for a superuser too."""

        protocol = ("oneshut",)

        def ls(self, path: str, detail: bool = False, **options: Any) -> list[Any]:
            if str(path).endswith("/shut"):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return list(super().ls(path, detail, **options))

    for folder in ("open", "shut"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("{}\n")
    fsspec.register_implementation("oneshut", OneShut, clobber=True)
    for path in (f"oneshut://{tmp_path}", f"oneshut://{tmp_path}/*/*.jsonl"):
        with pytest.raises(DataError, match="Permission denied"):
            files_of(path)


@pytest.mark.parametrize("behind", ["folder", "nothing"])
@pytest.mark.parametrize("pattern", ["", "/*/*.jsonl", "/**/*.jsonl"])
def test_a_link_that_leads_to_no_file_is_named(tmp_path: Path, behind: str, pattern: str) -> None:
    """Rows would be missing without a word."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jsonl").write_text("{}\n")
    data = tmp_path / "data"
    (data / "there").mkdir(parents=True)
    (data / "there" / "b.jsonl").write_text("{}\n")
    link = data / "sub" if behind == "folder" else data / "there" / "c.jsonl"
    link.symlink_to(tmp_path / ("real" if behind == "folder" else "gone"))
    with pytest.raises(DataError, match="lead to no file") as caught:
        files_of(f"{data}{pattern}")
    assert str(link.relative_to(data)) in str(caught.value.got)
    assert len(files_of(f"{data}/th*/b*.jsonl")) == 1  # it is in nobody's way there
    link.rename(link.with_name(f"_{link.name}"))
    assert len(files_of(str(data))) == 1


def test_a_million_tiny_rows(tmp_path: Path) -> None:
    count = 1_000_000
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" * count)
    place = row_id = None
    for total, (place, row_id, _) in enumerate(read_from(str(tmp_path / "rows.jsonl")), start=1):  # noqa: B007
        pass
    assert total == count and row_id == f"rows.jsonl:{count}" and place == Place(count - 1, 3 * count - 3, count - 1)


PEAK_OF_READING = """
import sys
from pathlib import Path
from posttrain_lib.data.sources import iter_rows
def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
for _ in iter_rows(sys.argv[2]):
    pass
before = peak()
print(sum(len(row["text"]) for _, row in iter_rows(sys.argv[1])), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_300_mb(tmp_path: Path, kind: str) -> None:
    size = 300_000_000
    between = [b"\n"] * 3
    path, small = tmp_path / f"rows.{kind}", tmp_path / f"small.{kind}"
    for file, text in ((path, "x" * size), (small, "x")):
        rows = [{"text": "a"}, {"text": text}, {"text": "b"}]
        file.write_bytes(
            contents(kind, rows, between, 9) if not kind.endswith((".gz", ".zst")) else _packed(kind, rows)
        )
    command = [sys.executable, "-c", PEAK_OF_READING, str(path), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    total, grown = map(int, done.stdout.split())
    assert total == size + 2
    # The line, its text and the parsed value at once, and a buffer that grows by copying.
    assert grown < 5 * size


def _packed(kind: str, rows: list[dict[str, Any]]) -> bytes:
    lines = json_lines(rows, [b"\n"] * 3)
    return gzip.compress(lines, 1) if kind.endswith("gz") else pa.compress(lines, codec="zstd", asbytes=True)
