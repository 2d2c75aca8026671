"""A run file that adds tokens: later steps see one grown folder, made or found, and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.schema.manifests import StepManifest
from steps import inputs
from steps.base import run_step

RAW: dict[str, Any] = {
    "name": "test",
    "data": {"sources": [{"name": "a", "generate": {"rows": 60}}], "max_example_tokens": 64},
    "model": {
        "from_scratch": {
            "tokenizer_vocab_size": 320,
            "architecture": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True,
            },
        },
    },
    "train": {"steps": 10, "row_tokens": 64},
}  # fmt: skip
ADDED = {"add_tokens": ["<|item|>"], "add_blocks": [{"format": "<item_{n}>", "count": 5}]}


def run(model: dict[str, Any], vocabulary: dict[str, Any]) -> StepManifest:
    config = build_run_config({**RAW, "model": {**model, "vocabulary": vocabulary}})
    return run_step(inputs.STEP, config, {}, say=lambda _: None)


def test_a_made_and_a_found_model_grow_alike(isolated_store: Path) -> None:
    plain = run(RAW["model"], {})
    folder = Path(plain.outputs["model"].uri)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    made, found = run(RAW["model"], ADDED), run({"path": str(folder)}, ADDED)
    for manifest in (made, found):
        assert manifest.key != plain.key
        model = manifest.outputs["model"]
        assert manifest.outputs["tokenizer"].uri == model.uri
        assert json.loads((Path(model.uri) / "config.json").read_text())["vocab_size"] == rows + 6
        tokenizer = ChatTokenizer(model.uri)
        assert tokenizer.encode("<|item|><item_4>").ids.tolist() == [rows, rows + 5]
    assert made.outputs["model"].digest == found.outputs["model"].digest != plain.outputs["model"].digest
    assert not [path for path in Path(made.outputs["model"].uri).parent.iterdir() if path.name.startswith("tmp")]


@pytest.mark.parametrize(
    ("change", "same"), [({"pad_to_multiple_of": 128}, True), ({"seed": 1}, False), ({"noise": 0.0}, False)]
)
def test_what_decides_the_folder_is_in_its_key(change: dict[str, Any], same: bool, isolated_store: Path) -> None:
    assert (run(RAW["model"], ADDED).key == run(RAW["model"], {**ADDED, **change}).key) is same


def test_a_model_in_a_store_grows_alike(isolated_store: Path) -> None:
    plain = run(RAW["model"], {})
    memory, folder = fsspec.filesystem("memory"), Path(plain.outputs["model"].uri)
    for path in folder.iterdir():
        memory.pipe(f"/growing/model/{path.name}", path.read_bytes())
    grown, stored = run({"path": str(folder)}, ADDED), run({"path": "memory://growing/model"}, ADDED)
    memory.rm("/growing", recursive=True)
    assert stored.outputs["model"].digest == grown.outputs["model"].digest
    assert not [path for path in Path(stored.outputs["model"].uri).parent.iterdir() if path.name.startswith("tmp")]
