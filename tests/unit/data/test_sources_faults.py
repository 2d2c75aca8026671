"""Rows from an object store that fails: what is transient costs time only, what is not is named, nothing is mixed."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from posttrain_lib.data import readers, remote
from posttrain_lib.data.sources import Place, files_of, iter_rows, read_from
from posttrain_lib.errors import DataError
from tests.support.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.support.s3 import s3_client, s3_environment, s3_server

#: noise, so that a compressed file is long as well
ROWS = [{"n": number, "text": f"grüß {random.Random(number).randbytes(number).hex()}"} for number in range(600)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
KINDS = ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "rows.arrow", "rows.json")
#: within the first range
SOMEWHERE = 3000


def written(name: str) -> bytes:
    table = pa.Table.from_pylist(ROWS)
    out = io.BytesIO()
    if name.endswith(".gz"):
        return gzip.compress(LINES)
    if name.endswith(".zst"):
        return pa.compress(LINES, codec="zstd", asbytes=True)
    if name.endswith(".parquet"):
        parquet.write_table(table, out, row_group_size=50)
    elif name.endswith(".arrow"):
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    else:
        return json.dumps(ROWS, ensure_ascii=False).encode() if name.endswith(".json") else LINES
    return out.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FaultyProxy, Any]]:
    """A proxy before an S3 server with one file of each kind, and a client that goes round the proxy."""
    with s3_server() as url, faulty_proxy(url) as proxy, s3_environment(proxy.url):
        client = s3_client(url)
        client.mkdir("rows")
        for name in KINDS:
            client.pipe(f"rows/{name}", written(name))
        for folder, number in itertools.product("abc", range(2)):
            client.pipe(f"rows/deep/{folder}/part-{number}.jsonl", b'{"a": 1}\n')
        yield proxy, client


@pytest.fixture
def proxy(server: tuple[FaultyProxy, Any], monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    """The proxy without faults, a reader of little patience, and ranges so short that every file has many."""
    monkeypatch.setattr(
        remote, "PATIENCE", remote.Patience(attempts=4, first_wait_seconds=0.01, longest_wait_seconds=0.02)
    )
    for name, value in {"FIRST_RANGE": 1 << 12, "FIRST_AHEAD": 1 << 13, "LARGEST_AHEAD": 1 << 15}.items():
        monkeypatch.setattr(remote, f"_{name}", value)
    monkeypatch.setattr(readers, "_BLOCK", 1 << 12)
    server[0].reset()
    return server[0]


@pytest.fixture
def short_stall(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(4, 0.01, 0.02, stall_seconds=0.5))


def rows_of(path: str) -> list[Any]:
    return [row for _, row in iter_rows(path)]


@pytest.mark.parametrize("name", KINDS)
class TestEveryKind:
    def test_a_sound_store(self, proxy: FaultyProxy, name: str) -> None:
        assert rows_of(f"s3://rows/{name}") == ROWS

    def test_connections_cut_in_the_body(self, proxy: FaultyProxy, name: str) -> None:
        proxy.faults += [Fault(1, after_bytes=SOMEWHERE, key=name), Fault(2, after_bytes=1, key=name)]
        proxy.faults.append(Fault(1, after_bytes=0, key=name))
        assert rows_of(f"s3://rows/{name}") == ROWS
        assert not any(fault.times for fault in proxy.faults)

    def test_errors_of_the_server(self, proxy: FaultyProxy, name: str) -> None:
        proxy.faults += [Fault(2, status=503, key=name), Fault(1, status=500, key=name)]
        proxy.faults += [Fault(1, status=503, key=name, method="HEAD")]
        assert rows_of(f"s3://rows/{name}") == ROWS
        assert not any(fault.times for fault in proxy.faults)

    @pytest.mark.usefixtures("short_stall")
    def test_a_stalled_connection(self, proxy: FaultyProxy, name: str) -> None:
        proxy.faults += [Fault(1, after_bytes=SOMEWHERE, stall=True, key=name), Fault(1, stall=True, key=name)]
        assert rows_of(f"s3://rows/{name}") == ROWS
        assert not any(fault.times for fault in proxy.faults)

    def test_a_file_replaced_while_it_is_read(
        self, proxy: FaultyProxy, server: tuple[FaultyProxy, Any], name: str
    ) -> None:
        """Whatever was asked for before is of the old version; the error comes with the first byte that is not."""
        reading = read_from(f"s3://rows/{name}")
        found = [next(reading)[2]]
        server[1].pipe(f"rows/{name}", written(name) + b" ")
        try:
            with pytest.raises(DataError, match="replaced while it was read") as caught:
                found.extend(row for _, _, row in reading)
        finally:
            server[1].pipe(f"rows/{name}", written(name))
        assert f"s3://rows/{name}" in str(caught.value)
        assert found == ROWS[: len(found)]


def test_only_what_is_missing_is_asked_for_again(proxy: FaultyProxy) -> None:
    proxy.faults.append(Fault(1, after_bytes=SOMEWHERE, key="rows.jsonl"))
    assert rows_of("s3://rows/rows.jsonl") == ROWS
    starts = [start for start, _ in proxy.ranges("rows.jsonl")]
    assert len(starts) == len(set(starts)), "a byte that arrived was asked for again"


@pytest.mark.parametrize(("status", "cause"), [(403, "PermissionError"), (404, "FileNotFoundError")])
def test_a_permanent_fault_is_told_at_once(proxy: FaultyProxy, status: int, cause: str) -> None:
    proxy.faults.append(Fault(99, status=status, key="rows.jsonl", from_byte=0))
    with pytest.raises(DataError, match="cannot be read") as caught:
        rows_of("s3://rows/rows.jsonl")
    assert "s3://rows/rows.jsonl" in str(caught.value) and cause in str(caught.value)
    ranges = proxy.ranges("rows.jsonl")
    assert len(ranges) == len(set(ranges)), "asked for again"


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(99, status=503), "SlowDown"),
        (Fault(99, status=500), "InternalError"),
        (Fault(99, after_bytes=0), "ClientPayloadError|ResponseStreamingError|bytes early"),
    ],
)
def test_a_fault_that_stays(proxy: FaultyProxy, fault: Fault, cause: str) -> None:
    fault.key = "deep/a/part-0"
    proxy.faults.append(fault)
    with pytest.raises(DataError, match="kept failing") as caught:
        rows_of("s3://rows/deep/a/part-0.jsonl")
    assert caught.value.where == "s3://rows/deep/a/part-0.jsonl"
    assert any(word in str(caught.value) for word in cause.split("|"))
    assert "4 attempts" in str(caught.value)
    assert len(proxy.ranges("deep/a/part-0")) == remote.PATIENCE.attempts


class TestListing:
    """A listing that fails in part must not look like a shorter listing."""

    GLOB = "s3://rows/deep/*/part-?.jsonl"

    @pytest.mark.parametrize("path", [GLOB, "s3://rows/deep", "s3://rows/deep/**/*.jsonl"])
    @pytest.mark.parametrize("faults", [1, 2])
    def test_a_transient_fault(self, proxy: FaultyProxy, path: str, faults: int) -> None:
        proxy.faults += [Fault(faults, status=503, key="rows"), Fault(1, status=500, method="HEAD", key="rows")]
        assert files_of(path) == [
            f"s3://rows/deep/{folder}/part-{number}.jsonl" for folder in "abc" for number in range(2)
        ]

    @pytest.mark.parametrize("status", [403, 500])
    @pytest.mark.parametrize("path", [GLOB, "s3://rows/deep"])
    def test_a_fault_that_stays(self, proxy: FaultyProxy, status: int, path: str) -> None:
        proxy.faults += [Fault(99, status=status, key="rows"), Fault(99, status=status, method="HEAD")]
        with pytest.raises(DataError, match="cannot be read") as caught:
            files_of(path)
        assert caught.value.where == path

    def test_a_missing_bucket(self, proxy: FaultyProxy) -> None:
        for path in ("s3://no-such-bucket/*.jsonl", "s3://no-such-bucket/a/rows.jsonl"):
            with pytest.raises(DataError, match=r"cannot be read|no file matches") as caught:
                files_of(path)
            assert caught.value.where == path
        assert len(proxy.seen) <= 8  # a HEAD and a listing for either, and what s3fs asks about buckets; no retries


class TestReadAhead:
    @pytest.mark.parametrize("name", ["long.jsonl", "long.json", "long.jsonl.gz", "long.jsonl.zst"])
    def test_the_first_row_needs_the_first_range_only(
        self, proxy: FaultyProxy, server: tuple[FaultyProxy, Any], name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As they are outside this file's tests.
        monkeypatch.setattr(remote, "_FIRST_RANGE", 1 << 18)
        monkeypatch.setattr(readers, "_BLOCK", 1 << 18)
        text = b"[" + LINES.replace(b"}\n", b"},") * 8 + b"{}]" if name.endswith(".json") else LINES * 8
        compress = {"gz": gzip.compress, "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}
        content = compress.get(name.rsplit(".", 1)[1], bytes)(text)
        assert len(content) > 1 << 20
        server[1].pipe(f"rows/{name}", content)
        proxy.faults.append(Fault(99, stall=True, key=name, from_byte=1))
        reading = read_from(f"s3://rows/{name}")
        assert next(reading)[2] == ROWS[0]
        reading.close()

    def test_ranges_are_under_way_together(self, proxy: FaultyProxy) -> None:
        proxy.latency_seconds = 0.02
        assert rows_of("s3://rows/rows.jsonl") == ROWS
        assert proxy.most_at_once > 1

    def test_a_slow_reader_is_not_run_ahead_of(self, proxy: FaultyProxy) -> None:
        reading = read_from("s3://rows/rows.jsonl")
        next(reading)
        asked = sum(end - start for start, end in proxy.ranges("rows.jsonl"))
        # the reader's buffer is full and what it holds lies behind; ahead is no more than may be ahead, and a range
        assert asked <= readers._BLOCK + remote._LARGEST_AHEAD + remote._FIRST_RANGE < len(LINES)
        reading.close()

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
    def test_every_byte_is_asked_for_once(self, proxy: FaultyProxy, name: str) -> None:
        assert rows_of(f"s3://rows/{name}") == ROWS
        asked = sum(end - start for start, end in proxy.ranges(name))
        footer = 1 << 16  # Parquet: read once for itself, once as what follows the last row group
        assert asked <= len(written(name)) + (footer if name.endswith(".parquet") else 0)

    def test_threads_end_with_the_reading(self, proxy: FaultyProxy) -> None:
        for _ in range(5):
            reading = read_from("s3://rows/rows.jsonl")
            next(reading)
            reading.close()
        for thread in threading.enumerate():
            if thread.name.startswith("ranges"):
                thread.join(timeout=30)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ranges")]


class TestGoingOn:
    def test_nothing_before_a_late_place_is_asked_for(self, proxy: FaultyProxy) -> None:
        places = [place for place, _, _ in read_from("s3://rows/rows.jsonl")]
        proxy.seen.clear()
        assert [row for _, _, row in read_from("s3://rows/rows.jsonl", places[500])] == ROWS[500:]
        assert min(start for start, _ in proxy.ranges("rows.jsonl")) == places[500].offset

    def test_row_groups_before_a_late_place_are_not_asked_for(self, proxy: FaultyProxy) -> None:
        whole = written("rows.parquet")
        places = [place for place, _, _ in read_from("s3://rows/rows.parquet")]
        proxy.seen.clear()
        assert [row for _, _, row in read_from("s3://rows/rows.parquet", places[520])] == ROWS[520:]
        groups = parquet.ParquetFile(io.BytesIO(whole)).metadata
        start = min(groups.row_group(10).column(column).data_page_offset for column in range(groups.num_columns))
        dictionaries = [groups.row_group(10).column(column).dictionary_page_offset for column in range(2)]
        start = min([start, *(offset for offset in dictionaries if offset is not None)])
        footer = len(whole) - (1 << 16)
        assert min(begin for begin, _ in proxy.ranges("rows.parquet")) >= min(start, max(0, footer))


def test_columns_of_a_large_row_group_are_read_in_turns(
    proxy: FaultyProxy, server: tuple[FaultyProxy, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row group, larger than what is held whole."""
    monkeypatch.setattr(readers, "_WHOLE_GROUP_BYTES", 1 << 10)
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), out, data_page_size=1 << 10, use_dictionary=False)
    server[1].pipe("rows/one-group.parquet", out.getvalue())
    assert rows_of("s3://rows/one-group.parquet") == ROWS
    proxy.faults += [Fault(3, after_bytes=100, key="one-group"), Fault(2, status=503, key="one-group")]
    assert rows_of("s3://rows/one-group.parquet") == ROWS


def test_a_datasets_folder_in_the_store(proxy: FaultyProxy, server: tuple[FaultyProxy, Any], tmp_path: Any) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    for file in (tmp_path / "saved").iterdir():
        server[1].pipe(f"rows/saved/{file.name}", file.read_bytes())
    assert files_of("s3://rows/saved") == ["s3://rows/saved"]
    assert list(iter_rows("s3://rows/saved")) == list(iter_rows(str(tmp_path / "saved")))
    assert [row for _, _, row in read_from("s3://rows/saved", Place(450))] == ROWS[450:]


class TestOtherStores:
    """fsspec's in-memory file system: no conditions on requests, a time of creation to compare."""

    def test_a_file_replaced_while_it_is_read(self, proxy: FaultyProxy) -> None:
        filesystem = fsspec.filesystem("memory")
        filesystem.pipe("/bucket/rows.jsonl", LINES * 20)
        reading = read_from("memory://bucket/rows.jsonl")
        next(reading)
        filesystem.pipe("/bucket/rows.jsonl", LINES * 20)
        with pytest.raises(DataError, match="replaced while it was read") as caught:
            list(reading)
        assert caught.value.where == "memory://bucket/rows.jsonl"

    def test_a_client_that_fails_in_its_own_way(self, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
        filesystem = fsspec.filesystem("memory")
        filesystem.pipe("/bucket/rows.jsonl", LINES)
        real, failing = type(filesystem).cat_file, iter([ConnectionResetError("reset"), TimeoutError(), None])

        def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
            fault = next(failing, None)
            if fault is not None:
                raise fault
            return real(self, path, start=start, end=end)

        monkeypatch.setattr(type(filesystem), "cat_file", cat_file)
        assert rows_of("memory://bucket/rows.jsonl") == ROWS
