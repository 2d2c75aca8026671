"""A tokenizer folder that cannot be loaded is named by what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import DataError

QWEN3 = {
    "model_type": "qwen3", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
    "layer_types": ["full_attention"] * 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = (turn["content"] for row in generate_rows(20, 0) for turn in row["messages"])
    build_tokenizer(texts, 320, tmp_path / "tok")
    return tmp_path / "tok"


def config(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**QWEN3, **changes}))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def weights_only(folder: Path) -> None:
    empty(folder)
    (folder / "model.safetensors").write_text("x")


@pytest.mark.parametrize(
    ("damage", "what", "where", "got"),
    [
        (empty, "the folder has no tokenizer", "tok", "an empty folder"),
        (weights_only, "the folder has no tokenizer", "tok", "model.safetensors"),
        (as_file, "a file, not a folder", "tok", None),
        (shutil.rmtree, "cannot be loaded", "tok", None),
        (lambda folder: (folder / "config.json").write_text("{"), "is broken", "config.json", "line 1"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is broken", "config.json", "a JSON list"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded", "tok", "added_tokens"),
        (config(rms_norm_eps="x"), r"refuses the config\.json", "config.json", "rms_norm_eps"),
        (config(num_hidden_layers=3), r"refuses the config\.json", "config.json", "num_hidden_layers"),
        (
            config(rope_parameters={"rope_type": "llama3", "rope_theta": 1.0, "factor": 8.0}),
            r"refuses the config\.json",
            "config.json",
            "low_freq_factor",
        ),
    ],
    ids=["empty", "weights", "file", "gone", "broken", "list", "tokenizer", "eps", "layers", "rope"],
)
def test_what_is_wrong_with_a_folder_is_said(
    folder: Path, damage: Callable[[Path], Any], what: str, where: str, got: str | None
) -> None:
    config()(folder)
    ChatTokenizer(folder)
    damage(folder)
    with pytest.raises(DataError, match=what) as caught:
        ChatTokenizer(folder)
    assert str(caught.value.where).endswith(where)
    assert got is None or got in str(caught.value.got)
    assert caught.value.fix


def test_a_template_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="the chat template cannot be read") as caught:
        ChatTokenizer(folder, chat_template=folder / "no.jinja")
    assert str(caught.value.where).endswith("no.jinja") and "data.chat_template" in str(caught.value.fix)
