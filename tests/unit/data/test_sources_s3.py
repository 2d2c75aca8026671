"""Rows from an object store: a real S3 protocol server on loopback, read through s3fs."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from posttrain_lib.data import remote
from posttrain_lib.data.sources import digest_rows, files_of, iter_rows, list_files, look_of
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests
from tests.support.s3 import s3_environment, s3_server

ROWS = [{"n": number, "text": "grüß"} for number in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket that lives as long as the module."""
    with s3_server() as url, s3_environment(url):
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.mkdir("rows")
        filesystem.pipe("rows/a/part-0.jsonl", LINES)
        filesystem.pipe("rows/a/part-1.jsonl.gz", gzip.compress(LINES))
        table = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(ROWS), table, row_group_size=3)
        filesystem.pipe("rows/b/part.parquet", table.getvalue())
        yield "s3://rows"


@pytest.mark.parametrize(("path", "times"), [("a/*.jsonl*", 2), ("a/part-0.jsonl", 1), ("b/*.parquet", 1), ("b", 1)])
def test_rows_of_a_glob_a_file_and_a_prefix(bucket: str, path: str, times: int) -> None:
    assert [row for _, row in iter_rows(f"{bucket}/{path}")] == ROWS * times


@pytest.mark.parametrize("path", ["marked", "marked/", "marked/**", "marked/*/*"])
def test_the_empty_keys_that_mark_folders_are_no_files(bucket: str, path: str) -> None:
    """Consoles write them on "create folder"."""
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe("rows/marked/deep/a.jsonl", LINES)
    for key in ("marked/", "marked/deep/", "marked/empty/"):
        filesystem.call_s3("put_object", Bucket="rows", Key=key, Body=b"")
    assert files_of(f"{bucket}/{path}") == ["s3://rows/marked/deep/a.jsonl"]
    assert [row for _, row in iter_rows(f"{bucket}/{path}")] == ROWS


def test_digests_follow_the_object(bucket: str) -> None:
    glob = f"{bucket}/a/*.jsonl"
    assert [file for file, _ in list_files(glob, FileDigests())] == ["s3://rows/a/part-0.jsonl"]
    before = digest_rows(glob, FileDigests())
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe("rows/a/part-0.jsonl", LINES + b"{}\n")
    changed = digest_rows(glob, FileDigests())
    filesystem.pipe("rows/a/part-0.jsonl", LINES)
    assert changed != before


def test_a_file_looks_as_it_was_listed_in_a_bucket_that_keeps_versions(bucket: str) -> None:
    """Which a listing does not tell. Training that reads the rows itself would take the file for another one."""
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("versions")
    filesystem.make_bucket_versioned("versions", True)
    for number in range(2):
        filesystem.pipe(f"versions/part-{number}.jsonl", LINES)
    listed = list_files("s3://versions/*.jsonl", FileDigests())
    assert len(listed) == 2 and all(look_of(file) == digest for file, digest in listed)
    filesystem.pipe("versions/part-0.jsonl", LINES + b"{}\n")
    assert [look_of(file) == digest for file, digest in listed] == [False, True]


@pytest.mark.parametrize("path", ["a/*.csv", "nothing/here.jsonl"])
def test_a_url_that_names_nothing(bucket: str, path: str) -> None:
    with pytest.raises(DataError, match="no file matches") as caught:
        list(iter_rows(f"{bucket}/{path}"))
    assert f"{bucket}/{path}" in str(caught.value)


def test_a_missing_bucket(bucket: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read|no file matches") as caught:
        list(iter_rows("s3://no-such-bucket/*.jsonl"))
    assert "no-such-bucket" in str(caught.value)


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own exception is no OSError; the path is named all the same."""
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(attempts=2, first_wait_seconds=0.01))
    with s3_environment("http://127.0.0.1:9"), pytest.raises(DataError, match="cannot be read") as caught:
        list(iter_rows("s3://away/rows.jsonl"))
    assert "s3://away/rows.jsonl" in str(caught.value)
