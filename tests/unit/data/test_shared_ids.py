"""A teacher's tokenizer must mean by an id what the student's means."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain_lib.data.shared_ids import check_shared_ids
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import DataError
from posttrain_lib.models.growth_tokenizer import NewToken, add_to_files, first_free_id, load_tokenizer


def texts(seed: int) -> Iterator[str]:
    return (turn["content"] for row in generate_rows(30, seed) for turn in row["messages"])


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    build_tokenizer(texts(0), 340, folder)
    return folder


def test_the_same_tokenizer(own: Path) -> None:
    check_shared_ids(own, own, where="distill.teacher.path")


def test_one_that_knows_more_may_teach_one_that_knows_less(own: Path, tmp_path: Path) -> None:
    more = shutil.copytree(own, tmp_path / "more")
    add_to_files(more, [NewToken("<item>", True, None)], first_free_id(load_tokenizer(own)))
    check_shared_ids(own, more, where="distill.teacher.path")
    with pytest.raises(DataError, match="no such token for '<item>'"):
        check_shared_ids(more, own, where="distill.teacher.path")


def test_another_one_is_refused_with_the_first_token_that_differs(own: Path, tmp_path: Path) -> None:
    build_tokenizer(("xyzzy " * 9 for _ in range(50)), 340, tmp_path)
    with pytest.raises(DataError, match="different tokenizers") as caught:
        check_shared_ids(own, tmp_path, where="distill.teacher.path")
    assert "distill.teacher.path" in str(caught.value)
