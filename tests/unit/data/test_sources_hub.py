"""Hub ids, by the real clients, against a hub on loopback: what is meant, what is read, what is refused, and faults."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from posttrain_lib.data import remote
from posttrain_lib.data.readers import BadRow, Place
from posttrain_lib.data.sources import digest_rows, files_of, iter_rows, list_files, pinned, read_from
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests
from tests.support.faulty_proxy import Fault
from tests.support.hub import GRANTED, Hub, hub_in_process, hub_server

ALWAYS = 10**9
README = """---
configs:
- config_name: main
  data_files:
  - {split: train_sft, path: main/train-*.parquet}
  - {split: test_sft, path: main/test.parquet}
- config_name: other
  data_files: other.parquet
---
# A data set
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(4, 0.01, 0.02))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server() as hub, hub_in_process(hub, tmp_path / "hf"):
        yield hub
        assert not hub.unknown, "the stand-in lacks something that the clients ask for"


def rows_of(name: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"from": name, "n": n, "turns": [{"text": f"{name} {n} é"}]} for n in range(first, first + count)]


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows: list[dict[str, Any]], group: int = 2) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=group, compression="none")
    return out.getvalue()


def written(rows: list[dict[str, Any]], ending: str) -> bytes | str:
    return parquet(rows) if ending == "parquet" else json_lines(rows)


def configured(ending: str = "parquet") -> dict[str, bytes | str]:
    """A data set with a README that names configs and splits."""
    return {
        "README.md": README.replace(".parquet", f".{ending}"),
        f"main/train-00000-of-00002.{ending}": written(rows_of("train", 5), ending),
        f"main/train-00001-of-00002.{ending}": written(rows_of("train", 4, 5), ending),
        f"main/test.{ending}": written(rows_of("test", 3), ending),
        f"other.{ending}": written(rows_of("other", 4), ending),
    }


def read(hub_id: str) -> list[dict[str, Any]]:
    return [row for _, row in iter_rows(hub_id)]  # type: ignore[misc]


def refused(hub_id: str) -> DataError:
    """The one error with which pinning and reading refuse the id."""
    with pytest.raises(DataError) as on_reading:
        read(hub_id)
    with pytest.raises(DataError) as on_pinning:
        pinned(hub_id)
    assert str(on_reading.value) == str(on_pinning.value)
    assert on_reading.value.where == hub_id and on_reading.value.fix
    return on_reading.value


# What an id means


@pytest.mark.parametrize("revision", [None, "main", "refs/pr/1", "v1.0", "feature/a"])
def test_a_pinned_id_names_a_commit_and_keeps_the_rest(hub: Hub, revision: str | None) -> None:
    commits = {
        ref: hub.commit("datasets", "o/n", {"a": ref}, ref) for ref in ("main", "refs/pr/1", "v1.0", "feature/a")
    }
    assert len(set(commits.values())) == 4
    for query in ("", "?split=test", "?config=main&split=train_sft", "?split=a%26b+c%25"):
        hub_id = "hf://o/n" + (f"@{revision}" if revision else "") + query
        expected = f"hf://o/n@{commits[revision or 'main']}{query}"
        assert pinned(hub_id) == expected
        hub.asked.clear()
        assert pinned(expected) == expected
        assert not hub.asked, "a commit needs no answer"
    assert pinned("hf://o/n?split=x&config=y").endswith("?config=y&split=x")


def test_the_digest_follows_branch_config_and_split(hub: Hub) -> None:
    hub.commit("datasets", "o/n", {"a": "1"})
    ids = [f"hf://o/n@main{query}" for query in ("", "?config=a", "?split=a", "?config=b&split=a")]
    before = [digest_rows(hub_id, FileDigests()) for hub_id in ids]
    assert len(set(before)) == len(ids)
    second = hub.commit("datasets", "o/n", {"a": "2"})
    assert not set(before) & {digest_rows(hub_id, FileDigests()) for hub_id in ids}
    assert list_files(ids[3], FileDigests()) == [(f"hf://o/n@{second}?config=b&split=a", f"{second}?config=b&split=a")]


@pytest.mark.parametrize(
    "hub_id",
    [
        "hf://",
        "hf://name",
        "hf://owner/name/train.jsonl",
        "hf://owner/na me",
        "hf://owner/name@",
        "hf://owner/name?",
        "hf://owner/name?split",
        "hf://owner/name?split=",
        "hf://owner/name?splits=train",
        "hf://owner/name?split=a&split=b",
    ],
)
def test_a_malformed_id(hub: Hub, hub_id: str) -> None:
    assert "malformed" in str(refused(hub_id)) and not hub.asked


# What is read


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("?config=main&split=train_sft", rows_of("train", 9)),
        ("?config=main&split=test_sft", rows_of("test", 3)),
        ("?config=other", rows_of("other", 4)),
    ],
)
def test_rows_of_a_config_and_a_split(hub: Hub, query: str, expected: list[dict[str, Any]], ending: str) -> None:
    hub.commit("datasets", "o/n", configured(ending))
    hub.page = 2  # trees come in pages
    hub_id = f"hf://o/n{query}"
    assert files_of(hub_id) == [hub_id]
    assert read(hub_id) == expected
    assert [row_id for row_id, _ in iter_rows(hub_id)] == [f"o/n:{n + 1}" for n in range(len(expected))]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_without_a_readme_splits_come_from_the_names_of_files(hub: Hub, ending: str) -> None:
    files = {f"data/train-{part}.{ending}": written(rows_of("train", 3, 3 * part), ending) for part in range(3)}
    hub.commit("datasets", "o/n", {**files, f"data/test.{ending}": written(rows_of("test", 2), ending)})
    assert read("hf://o/n") == rows_of("train", 9)
    assert read("hf://o/n?split=test") == rows_of("test", 2)


def test_fields_that_a_row_does_not_have_are_not_invented(hub: Hub) -> None:
    rows = [{"a": 1, "b": None, "in": {"x": 1}}, {"a": None, "b": 2, "in": {"y": 3}}]
    hub.commit("datasets", "o/n", {"train.parquet": parquet(rows)})
    assert read("hf://o/n") == [{"a": 1, "in": {"x": 1}}, {"b": 2, "in": {"y": 3}}]


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json"])
def test_json_is_read_as_it_is_written(hub: Hub, ending: str) -> None:
    rows = [{"a": 1, "in": {"x": 1}}, {"b": "two", "in": {"y": None}}]
    hub.commit("datasets", "o/n", {f"train.{ending}": json_lines(rows)})
    assert read("hf://o/n") == rows


def test_a_broken_line_is_a_bad_row_among_good_ones(hub: Hub) -> None:
    good = rows_of("a", 4)
    files = {"train-0.jsonl": json_lines(good[:2]) + "{broken\n", "train-1.jsonl": json_lines(good[2:])}
    hub.commit("datasets", "o/n", files)
    found = [(row_id, row) for _, row_id, row in read_from("hf://o/n")]
    assert [row_id for row_id, _ in found] == [f"o/n:{number}" for number in range(1, 6)]
    assert [row for _, row in found if not isinstance(row, BadRow)] == good
    bad = found[2][1]
    assert isinstance(bad, BadRow) and (bad.reason, bad.raw) == ("broken_json", "{broken\n")
    assert [row for _, _, row in read_from("hf://o/n", Place(3))] == good[2:]


def test_what_the_readme_says_of_the_fields_holds(hub: Hub) -> None:
    """``datasets`` makes these rows: a feature is declared, here as text."""
    told = "---\ndataset_info:\n  features:\n  - {name: n, dtype: string}\n---\n"
    hub.commit("datasets", "o/n", {"README.md": told, "train.jsonl": json_lines([{"n": 7}])})
    assert read("hf://o/n") == [{"n": "7"}]


def test_a_pinned_id_is_read_at_its_commit_though_main_moved(hub: Hub) -> None:
    hub.commit("datasets", "o/n", {"train.jsonl": json_lines(rows_of("old", 3))})
    before = pinned("hf://o/n")
    hub.commit("datasets", "o/n", {"train.jsonl": json_lines(rows_of("new", 2))})
    hub.commit("datasets", "o/n", {"train.jsonl": json_lines(rows_of("proposed", 1))}, "refs/pr/7")
    assert read(before) == rows_of("old", 3)
    assert read("hf://o/n") == rows_of("new", 2)
    assert read("hf://o/n@refs/pr/7") == rows_of("proposed", 1)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_reading_goes_on_at_every_place(hub: Hub, ending: str) -> None:
    hub.commit("datasets", "o/n", configured(ending))
    hub_id = "hf://o/n?config=main&split=train_sft"
    whole = list(read_from(hub_id))
    assert len(whole) == 9
    for at, (place, _, _) in enumerate(whole):
        assert list(read_from(hub_id, place)) == whole[at:]


def test_a_folder_of_the_same_name_is_not_read_instead(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("datasets", "o/n", {"train.jsonl": json_lines(rows_of("hub", 2))})
    (tmp_path / "o" / "n").mkdir(parents=True)
    (tmp_path / "o" / "n" / "train.jsonl").write_text(json_lines(rows_of("folder", 2)))
    monkeypatch.chdir(tmp_path)
    assert read("hf://o/n") == rows_of("hub", 2)


def test_single_files_and_globs_on_the_hub(hub: Hub) -> None:
    first = hub.commit("datasets", "o/n", configured())
    path = f"hf://datasets/o/n@{first}/main/train-*.parquet"
    assert read(path) == rows_of("train", 9)
    assert read("hf://datasets/o/n/other.parquet") == rows_of("other", 4)
    assert read("hf://datasets/o/n") == rows_of("test", 3) + rows_of("train", 9) + rows_of("other", 4), "below a folder"
    before = digest_rows("hf://datasets/o/n/other.parquet", FileDigests())
    assert digest_rows(f"hf://datasets/o/n@{first}/other.parquet", FileDigests()) == before
    hub.commit("datasets", "o/n", {**configured(), "other.parquet": parquet(rows_of("rehto", 4))})
    assert digest_rows("hf://datasets/o/n/other.parquet", FileDigests()) != before, "of the same size"


# What is refused


@pytest.mark.parametrize(
    ("query", "said"), [("", "Config name is missing"), ("?config=main", "train_sft"), ("?config=no", "main")]
)
def test_what_is_to_be_chosen_is_said(hub: Hub, query: str, said: str) -> None:
    hub.commit("datasets", "o/n", configured())
    with pytest.raises(DataError, match=said) as caught:
        read(f"hf://o/n{query}")
    assert caught.value.where == f"hf://o/n{query}"
    assert caught.value.fix is not None and "?config=" in caught.value.fix


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_data_set_that_the_hub_does_not_have(hub: Hub, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    error = refused("hf://owner/gone?split=test")
    assert error.what == "the hub has no such data set, or it is private"
    assert error.got == "owner/gone" and "HF_TOKEN" in str(error.fix)


def test_a_revision_that_the_data_set_does_not_have(hub: Hub) -> None:
    hub.commit("datasets", "o/n", configured())
    error = refused("hf://o/n@gone?config=other")
    assert error.what == "the data set has no such revision" and error.got == "gone"
    with pytest.raises(DataError, match="no such revision") as caught:
        read(f"hf://o/n@{'0' * 40}?config=other")
    assert caught.value.got == "0" * 40


def test_a_gated_data_set_is_refused_before_its_rows_are_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.commit("datasets", "o/n", configured())
    hub.repositories["datasets", "o/n"].gated = True
    error = refused("hf://o/n?config=main&split=train_sft")
    assert error.what == "the data set is gated" and "ask for access" in str(error.fix)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the token gives no access" in refused("hf://o/n?config=main&split=train_sft").what
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    assert read(f"hf://o/n@{commit}?config=main&split=train_sft") == rows_of("train", 9)
    stored = [asked for asked in hub.asked if asked.path.startswith("/storage/")]
    assert stored and not any(asked.has_token for asked in stored), "the token is the hub's alone"


def test_a_hub_that_is_switched_off_is_said_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(refused("hf://o/n").got)
    assert not hub.asked


# What the hub and the network do


def in_parts(ending: str) -> dict[str, bytes | str]:
    """Twelve rows in four files, each of more bytes than the network takes at once."""
    return {f"data/train-{part}.{ending}": written(large()[3 * part :][:3], ending) for part in range(4)}


def large() -> list[dict[str, Any]]:
    noise = random.Random(0)
    return [{"n": n, "text": noise.randbytes(100_000).hex()} for n in range(12)]


def third_part(hub: Hub, ending: str) -> str:
    """In the path of every request for the bytes of the third file."""
    files = next(iter(hub.repositories["datasets", "o/n"].commits.values()))
    return hashlib.sha256(files["data/train-2.parquet"]).hexdigest() if ending == "parquet" else "train-2.jsonl"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_one_failure_of_every_kind_of_request(hub: Hub, status: int) -> None:
    hub.commit("datasets", "o/n", configured())
    hub.faults = [
        Fault(1, status, key=key, method=method)
        for key, method in (
            ("/revision/", "GET"),
            ("/auth-check", "GET"),
            ("README.md", "HEAD"),
            ("README.md", "GET"),
            ("/tree/", "GET"),
            ("/resolve/", "GET"),
            ("/storage/", "GET"),
        )
    ]
    assert read("hf://o/n@main?config=main&split=train_sft") == rows_of("train", 9)
    assert not any(fault.times for fault in hub.faults)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_connection_cut_in_a_file_loses_and_doubles_nothing(hub: Hub, ending: str) -> None:
    hub.commit("datasets", "o/n", in_parts(ending))
    hub.faults = [Fault(2, after_bytes=bytes_, key=third_part(hub, ending), from_byte=1) for bytes_ in (0, 300_000)]
    hub.faults += [Fault(1, after_bytes=bytes_, key=third_part(hub, ending)) for bytes_ in (0, 300_000)]
    assert read("hf://o/n") == large()
    assert not any(fault.times for fault in hub.faults[2:])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_outlasts_the_client_is_read_on_after_the_last_row(hub: Hub, ending: str) -> None:
    """The client gives a file up after six answers of 503, and opening a data set again after six more. JSON is opened
    by its file's name: the data set is not asked for again."""
    hub.commit("datasets", "o/n", in_parts(ending))
    rows = read_from("hf://o/n")
    seen = [next(rows)]
    again = [Fault(8, 503, key="README.md", method="HEAD")] if ending == "parquet" else []
    hub.faults = [Fault(6, 503, key=third_part(hub, ending)), *again]
    hub.commit("datasets", "o/n", {"train.jsonl": json_lines(rows_of("moved", 3))})
    seen += rows
    assert [row for _, _, row in seen] == large()
    assert [place.row for place, _, _ in seen] == list(range(12))
    assert not any(fault.times for fault in hub.faults)


@pytest.mark.parametrize("status", [503, None], ids=["refuses", "cuts"])
def test_a_hub_that_keeps_failing_is_given_up(hub: Hub, status: int | None) -> None:
    hub.commit("datasets", "o/n", in_parts("parquet"))
    hub.faults = [Fault(ALWAYS, status, key=third_part(hub, "parquet"))]
    rows = read_from(pinned("hf://o/n"))
    seen = [next(rows)[2] for _ in range(6)]
    with pytest.raises(DataError, match="kept failing") as caught:
        next(rows)
    assert seen == large()[:6]
    assert "o/n" in str(caught.value.where) and "run again" in str(caught.value.fix)


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", remote.Patience(3, 0.01, 0.02))
    with hub_server() as hub:
        pass
    with hub_in_process(hub, tmp_path):
        error = refused("hf://o/n")
    assert "kept failing" in error.what and "3 attempts" in str(error.got)


def test_what_datasets_has_in_its_cache_is_not_read_instead(hub: Hub) -> None:
    """``datasets`` gives the last version it ever prepared where the hub fails."""
    import datasets

    hub.commit("datasets", "o/n", {"train.jsonl": json_lines(rows_of("old", 3))})
    datasets.load_dataset("o/n")
    hub.commit("datasets", "o/n", {"train.jsonl": json_lines(rows_of("new", 3))})
    hub.faults = [Fault(ALWAYS, 503, key="/resolve/", method="HEAD")]
    with pytest.raises(DataError, match="kept failing"):
        read("hf://o/n")
