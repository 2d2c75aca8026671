"""A model folder is refused by its small files and headers, whatever its weights hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain_lib.checkpoint.folder_headers import check_folder_headers
from posttrain_lib.errors import ModelError

HEAD = "lm_head.weight"
#: name -> (what is done to the folder, what is said of it)
Cases = dict[str, tuple[Callable[[Path], Any], str]]


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def settings(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return damage


def renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def shifted(folder: Path) -> None:
    """A tensor's place, eight bytes further on: as many digits, so that the file's length stays."""
    path = folder / "model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    begin, end = max(meta["data_offsets"] for meta in header.values() if "data_offsets" in meta)
    before, after = (f"[{place},{end}]".encode() for place in (begin, begin + 8))
    assert len(before) == len(after)
    path.write_bytes(path.read_bytes().replace(before, after, 1))


def too_many_tokens(folder: Path) -> None:
    vocabulary = {f"t{number}": number for number in range(10_000)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


def no_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


#: of the folder as such, whoever runs the model
OF_ANY: Cases = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "does not hold an object"),
    "quantised": (settings(quantization_config={"quant_method": "fp8"}), "quantised"),
    "another head": (settings(architectures=["LlamaForTokenClassification"]), "not a plain causal language model"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
    "no index": (no_index, "their index is missing"),
    "other weights": (renamed, "no safetensors weights"),
    "cut": (cut, "truncated"),
    "shifted": (shifted, "a place that it cannot have"),
    "tokenizer": (too_many_tokens, "larger than the embedding"),
}
#: of the tensors by name, which our definitions alone know beforehand
OF_OURS: Cases = {
    "missing": (weights(lambda tensors: tensors.pop(HEAD)), "lack 1 tensor"),
    "unexpected": (weights(lambda tensors: tensors.update(more=torch.zeros(1))), "has no place for"),
    "shape": (weights(lambda tensors: tensors.update({HEAD: tensors[HEAD][1:].contiguous()})), "another shape"),
    "dtype": (weights(lambda tensors: tensors.update({HEAD: tensors[HEAD].double()})), "dtype that cannot be trained"),
    "rope": (settings(rope_parameters={"rope_type": ["a"]}), "cannot be made of"),
    "rope text": (settings(rope_parameters="x"), "cannot be made of"),
    "type": (settings(model_type=["llama"]), "architecture is not supported"),
    "no heads": (settings(architectures=5), "not a plain causal language model"),
}


@pytest.mark.parametrize("name", [*OF_ANY, *OF_OURS])
def test_a_damaged_folder_is_refused(folder: Path, name: str) -> None:
    check_folder_headers(folder, "native", folder)
    damage, said = {**OF_ANY, **OF_OURS}[name]
    damage(folder)
    with pytest.raises(ModelError, match=said):
        check_folder_headers(folder, "native", folder)


@pytest.mark.parametrize("name", OF_ANY)
def test_so_is_one_of_transformers_own_classes(folder: Path, name: str) -> None:
    check_folder_headers(folder, "hf", folder)
    damage, said = OF_ANY[name]
    damage(folder)
    with pytest.raises(ModelError, match=said):
        check_folder_headers(folder, "hf", folder)


def test_no_weight_is_read(folder: Path) -> None:
    """The values are another check's; here a file of the right length is as good."""
    weights(lambda tensors: tensors[HEAD].fill_(float("nan")))(folder)
    check_folder_headers(folder, "native", folder)


def test_the_tokenizer_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    too_many_tokens(tmp_path / "other")
    with pytest.raises(ModelError, match="larger than the embedding"):
        check_folder_headers(folder, "native", tmp_path / "other")
