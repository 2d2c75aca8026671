"""Rows out of every kind of file, with ids that lead back to the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from posttrain_lib.data.sources import (
    BadRow,
    digest_rows,
    files_of,
    iter_rows,
    list_files,
    names_of,
    pinned,
    read_from,
)
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests

ROWS = [{"messages": [{"role": "user", "content": f"grüß {number}\u2028"}], "id": number} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def digest(path: object) -> str:
    return digest_rows(pinned(str(path)), FileDigests())


def rows_of(path: object) -> list[dict[str, Any]]:
    found = [row for _, row in iter_rows(str(path))]
    assert not [row for row in found if isinstance(row, BadRow)]
    return found  # type: ignore[return-value]


def plain(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(LINES, encoding="utf-8")
    return path


def gzipped(folder: Path) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    return path


def zstd(folder: Path) -> Path:
    path = folder / "rows.jsonl.zst"
    with fsspec.open(str(path), "wb", compression="zstd") as handle:
        handle.write(LINES.encode())
    return path


def array(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text("\ufeff " + json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def row_groups(folder: Path) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    return path


def saved_dataset(folder: Path) -> Path:
    import datasets

    path = folder / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


KINDS = (plain, gzipped, zstd, array, row_groups, saved_dataset)


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
class TestEveryKind:
    def test_the_same_rows(self, write: Any, tmp_path: Path) -> None:
        assert rows_of(write(tmp_path)) == ROWS

    def test_ids_name_file_and_place(self, write: Any, tmp_path: Path) -> None:
        path = write(tmp_path)
        assert [row_id for row_id, _ in iter_rows(str(path))] == [f"{path.name}:{number}" for number in range(1, 6)]

    def test_the_digest_follows_the_content(self, write: Any, tmp_path: Path) -> None:
        path = write(tmp_path)
        before = digest(path)
        assert before == digest(path)
        victim = max((file for file in path.rglob("*") if file.is_file()), default=path) if path.is_dir() else path
        victim.write_bytes(victim.read_bytes() + b" ")
        assert digest(path) != before


def test_a_glob_and_a_folder_are_read_in_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps({"n": number}) + "\n")
    expected = [("part-0.jsonl:1", {"n": 0}), ("part-1.jsonl:1", {"n": 1}), ("part-2.jsonl:1", {"n": 2})]
    assert list(iter_rows(str(tmp_path / "part-*.jsonl"))) == expected
    assert list(iter_rows(str(tmp_path))) == expected


def test_an_fsspec_url(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/rows.jsonl", LINES.encode())
    assert rows_of("memory://bucket/rows.jsonl") == ROWS
    first = digest("memory://bucket/*.jsonl")
    filesystem.pipe("/bucket/rows.jsonl", LINES.encode() + b"{}\n")
    assert digest("memory://bucket/*.jsonl") != first


def test_a_broken_line_is_kept_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n\xff\xfe\n{"a": 2}\n')
    found = list(iter_rows(str(path)))
    assert [row_id for row_id, _ in found] == [f"rows.jsonl:{number}" for number in (1, 3, 4, 5, 6)]
    bad = [row for _, row in found if isinstance(row, BadRow)]
    assert [row.reason for row in bad] == ["broken_json", "not_an_object", "not_utf8"]
    assert bad[0].raw == '{"a": \n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b"", "no rows"),
        ("rows.csv", b"a,b\n", "unknown kind"),
        ("rows.parquet", b"PAR1 nothing else", "cannot be read"),
        ("rows.jsonl.zst", b"no zstd", "cannot be read"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cannot be read"),
        ("rows.json", b"[{}, ", "does not end as one"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(iter_rows(str(path)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", ["missing.jsonl", "nothing-*.jsonl", "nosuchscheme://a/b.jsonl"])
def test_a_path_that_names_nothing(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"no file matches|cannot be read"):
        digest(path if "://" in path else tmp_path / path)


def test_the_digest_knows_names_and_order(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"n": 1}\n'), ("b.jsonl", '{"n": 2}\n')):
        (tmp_path / name).write_text(text)
    before = digest(tmp_path)
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    assert digest(tmp_path) != before


def test_a_relative_path_means_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pinned("rows/*.jsonl") == str(tmp_path / "rows" / "*.jsonl")
    assert pinned("s3://bucket/rows.jsonl") == "s3://bucket/rows.jsonl"


def test_fields_that_arrow_invented_are_gone(tmp_path: Path) -> None:
    """Two calls with different arguments share one struct column, each with the other's fields as nulls."""
    calls = [{"call": {"arguments": {"city": "Rome"}}}, {"call": {"arguments": {"x": 1}}}]
    parquet.write_table(pa.Table.from_pylist(calls), tmp_path / "calls.parquet")
    assert rows_of(tmp_path / "calls.parquet") == calls


@pytest.mark.parametrize("nested", [False, True])
def test_columns_of_one_name_are_refused(tmp_path: Path, nested: bool) -> None:
    """A row has room for one of them; the other would be gone without a word."""
    first, second = pa.array(["a"]), pa.array(["b"])
    if nested:
        table = pa.table({"call": pa.StructArray.from_arrays([first, second], names=["text", "text"])})
    else:
        table = pa.table([first, second], names=["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        with pytest.raises(DataError, match="one name"):
            rows_of(tmp_path / name)


def test_what_a_json_array_holds_besides_objects_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1}, [2]]')
    found = [row for _, row in iter_rows(str(tmp_path / "rows.json"))]
    assert found[0] == {"a": 1}
    assert isinstance(found[1], BadRow) and found[1].reason == "not_an_object"


@pytest.mark.parametrize(
    ("name", "before", "between", "behind"), [("rows.jsonl", "", "\n", ""), ("rows.json", "[", ",", "]")]
)
def test_a_key_that_is_there_twice_is_a_bad_row(
    tmp_path: Path, name: str, before: str, between: str, behind: str
) -> None:
    inner = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    rows = ['{"text": "a", "text": "b"}', '{"text": "c"}', inner, '{"a": {"x": 1}, "b": {"x": 2}}']
    (tmp_path / name).write_text(before + between.join(rows) + behind, encoding="utf-8")
    found = [row for _, row in iter_rows(str(tmp_path / name))]
    assert [row for row in found if isinstance(row, dict)] == [{"text": "c"}, {"a": {"x": 1}, "b": {"x": 2}}]
    bad = [row for row in found if isinstance(row, BadRow)]
    assert [row.reason for row in bad] == ["repeated_key"] * 2
    assert ["'text'" in bad[0].detail, "'content'" in bad[1].detail] == [True, True]


def test_json_nested_beyond_reading_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"a": 1}\n')
    found = [row for _, row in iter_rows(str(tmp_path / "rows.jsonl"))]
    assert isinstance(found[0], BadRow) and found[1] == {"a": 1}


def test_a_folder_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    import datasets

    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="several splits") as caught:
        list(iter_rows(str(tmp_path / "both")))
    assert "both/train" in str(caught.value)
    assert rows_of(tmp_path / "both" / "train") == ROWS


def test_what_is_listed_with_digests_is_what_is_read(tmp_path: Path) -> None:
    for write in KINDS:
        path = str(write(tmp_path))
        assert [file for file, _ in list_files(path, FileDigests())] == files_of(path)


class TestFolders:
    """Only a folder is sifted; a glob and a file are taken at their word."""

    BESIDE = (
        "README.md",
        "readme",
        "LICENSE",
        "LICENSE.txt",
        ".gitattributes",
        ".cache/huggingface/x.json",
        "_SUCCESS",
        "_metadata",
        "_temporary/0/part.jsonl",
        "part.jsonl.crc",
        "dataset_infos.json",
        "dataset_info.json",
    )

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "_kept" / "_day=1").mkdir(parents=True)
        (tmp_path / "_kept" / "a.jsonl").write_text('{"n": 1}\n')
        (tmp_path / "_kept" / "_day=1" / "README.jsonl").write_text('{"n": 2}\n')
        return tmp_path / "_kept"

    def test_what_stands_beside_data_is_no_data(self, folder: Path) -> None:
        before = digest(folder)
        for name in self.BESIDE:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        assert list(iter_rows(str(folder))) == [("README.jsonl:1", {"n": 2}), ("a.jsonl:1", {"n": 1})]
        assert digest(folder) == before

    def test_anything_else_is_refused_by_name(self, folder: Path) -> None:
        for name in ("rows.csv", "deep/b.jsonl.bz2", *(f"{number}.txt" for number in range(5))):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("")
        with pytest.raises(DataError, match="unknown kind") as caught:
            files_of(str(folder))
        assert caught.value.where == str(folder)
        assert caught.value.got == "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more"

    def test_a_folder_of_nothing_else_says_what_it_has(self, tmp_path: Path) -> None:
        (tmp_path / "_all.jsonl").write_text('{"n": 1}\n')
        with pytest.raises(DataError, match="nothing that is read") as caught:
            files_of(str(tmp_path))
        assert caught.value.got == "_all.jsonl"
        assert rows_of(tmp_path / "_all.jsonl") == rows_of(tmp_path / "*.jsonl") == [{"n": 1}]

    def test_a_glob_is_strict(self, folder: Path) -> None:
        (folder / "README.md").write_text("x")
        with pytest.raises(DataError, match=r"unknown kind.*\n.*README.md"):
            list(iter_rows(str(folder / "*")))


class TestNames:
    """What row ids call files: unique within a source, and short where that is enough."""

    @pytest.mark.parametrize(
        ("files", "names"),
        [
            (["/x/a/one.jsonl", "/x/b/two.jsonl"], ["one.jsonl", "two.jsonl"]),
            (["/x/a/t.jsonl", "/x/b/t.jsonl", "/x/b/u.jsonl"], ["a/t.jsonl", "b/t.jsonl", "b/u.jsonl"]),
            (["/x/a/t.jsonl", "/x/a/y/t.jsonl"], ["t.jsonl", "y/t.jsonl"]),
            (["s3://bucket/a/t.jsonl", "s3://bucket/c/d/t.jsonl"], ["a/t.jsonl", "c/d/t.jsonl"]),
            (["/x/saved/"], ["saved"]),
            (["hf://owner/name@main?config=a"], ["owner/name"]),
            ([], []),
        ],
    )
    def test_of_files(self, files: list[str], names: list[str]) -> None:
        assert names_of(files) == names

    def test_row_ids_differ_where_base_names_do_not(self, tmp_path: Path) -> None:
        for number, name in enumerate("ab"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "train.jsonl").write_text(json.dumps({"n": number}) + "\n")
        glob = str(tmp_path / "*" / "train.jsonl")
        assert list(iter_rows(glob)) == [("a/train.jsonl:1", {"n": 0}), ("b/train.jsonl:1", {"n": 1})]
        before = digest(glob)
        (tmp_path / "a").rename(tmp_path / "A")
        assert digest(glob) != before  # the ids are others

    @pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
    def test_a_name_that_is_given(self, write: Any, tmp_path: Path) -> None:
        [file] = files_of(str(write(tmp_path)))
        assert [row_id for _, row_id, _ in read_from(file, name="a/b")] == [f"a/b:{n}" for n in range(1, 6)]


def test_absent_credentials_are_no_damaged_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(DataError, match="NoCredentialsError") as caught:
        files_of("s3://bucket-of-nobody/rows.jsonl")
    assert caught.value.fix is not None
    assert "AWS_ACCESS_KEY_ID" in caught.value.fix and "damaged" not in caught.value.fix
