"""Hub ids: config, split and commit.

The hub cannot be reached from tests, so that which commit a branch stands at is told by a stand-in for
``huggingface_hub.HfApi``, the only one here. Rows are read by ``datasets`` itself, which takes the path of a folder
that is laid out like a hub repository where the hub's name would be.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from posttrain_lib.data.sources import digest_rows, files_of, iter_rows, list_files, pinned, read_from
from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import FileDigests

FIRST, SECOND = "0123456789abcdef" * 2 + "01234567", "f" * 40


class Hub:
    """``HfApi`` as far as it is used: branches, and what each is asked for."""

    heads: dict[str | None, str]
    asked: list[tuple[str, str | None]]

    def dataset_info(self, name: str, revision: str | None = None) -> SimpleNamespace:
        self.asked.append((name, revision))
        if revision not in self.heads:
            raise OSError(f"no revision {revision}")
        return SimpleNamespace(sha=self.heads[revision])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.heads, Hub.asked = {None: FIRST, "main": FIRST, "refs/pr/1": SECOND}, []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


@pytest.mark.parametrize(
    ("hub_id", "expected"),
    [
        ("hf://owner/name", f"hf://owner/name@{FIRST}"),
        ("hf://owner/name@main", f"hf://owner/name@{FIRST}"),
        ("hf://owner/name@refs/pr/1?split=test", f"hf://owner/name@{SECOND}?split=test"),
        ("hf://owner/name?split=train_sft&config=main", f"hf://owner/name@{FIRST}?config=main&split=train_sft"),
        ("hf://owner/name?split=a%26b+c%25", f"hf://owner/name@{FIRST}?split=a%26b+c%25"),
    ],
)
def test_a_pinned_id_names_a_commit_and_keeps_the_rest(hub: type[Hub], hub_id: str, expected: str) -> None:
    assert pinned(hub_id) == expected
    hub.asked.clear()
    assert pinned(expected) == expected
    assert not hub.asked, "a commit needs no answer"


def test_the_digest_follows_branch_config_and_split(hub: type[Hub]) -> None:
    ids = [f"hf://owner/name@main{query}" for query in ("", "?config=a", "?split=a", "?config=b&split=a")]
    before = [digest_rows(hub_id, FileDigests()) for hub_id in ids]
    assert len(set(before)) == len(ids)
    hub.heads["main"] = SECOND
    assert not set(before) & {digest_rows(hub_id, FileDigests()) for hub_id in ids}
    assert list_files(ids[3], FileDigests()) == [
        (f"hf://owner/name@{SECOND}?config=b&split=a", f"{SECOND}?config=b&split=a")
    ]


def test_what_the_hub_does_not_have_is_named(hub: type[Hub]) -> None:
    with pytest.raises(DataError, match="no revision gone") as caught:
        pinned("hf://owner/name@gone?split=test")
    assert caught.value.where == "hf://owner/name@gone?split=test"


@pytest.mark.parametrize(
    "hub_id",
    [
        "hf://",
        "hf://owner/name@",
        "hf://owner/name?",
        "hf://owner/name?split",
        "hf://owner/name?split=",
        "hf://owner/name?splits=train",
        "hf://owner/name?split=a&split=b",
    ],
)
def test_a_malformed_id(hub: type[Hub], hub_id: str) -> None:
    with pytest.raises(DataError, match="malformed") as caught:
        pinned(hub_id)
    assert caught.value.where == hub_id and not hub.asked


@pytest.fixture
def repository(tmp_path: Path) -> str:
    """Id of a data set of two configs, one with a split of an unusual name."""
    lines = ["---", "configs:"]
    for config, split in (("main", "train_sft"), ("other", "train")):
        (tmp_path / f"{config}.jsonl").write_text("".join(json.dumps({config: n}) + "\n" for n in range(3)))
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {config}.jsonl"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---", ""]))
    return f"hf://{tmp_path}"


def test_rows_of_a_config_and_a_split(repository: str) -> None:
    assert files_of(f"{repository}?config=other") == [f"{repository}?config=other"]
    assert [row for _, row in iter_rows(f"{repository}?config=other")] == [{"other": n} for n in range(3)]
    hub_id = f"{repository}?config=main&split=train_sft"
    found = list(read_from(hub_id))
    assert [row for _, _, row in found] == [{"main": n} for n in range(3)]
    assert [row_id for _, row_id, _ in found] == [f"{repository.removeprefix('hf://')}:{n}" for n in (1, 2, 3)]
    assert list(read_from(hub_id, found[2][0])) == found[2:]


@pytest.mark.parametrize(
    ("query", "said"), [("", "Config name is missing"), ("?config=main", "train_sft"), ("?config=no", "main")]
)
def test_what_is_to_be_chosen_is_said(repository: str, query: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        list(iter_rows(repository + query))
    assert caught.value.where == repository + query
    assert caught.value.fix is not None and "?config=" in caught.value.fix
