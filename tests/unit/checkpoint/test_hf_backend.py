"""What is proven of a class of transformers before it is trained, and what is written of it afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain_lib.checkpoint.exported import compare_with_reference, exported_dtype
from posttrain_lib.checkpoint.hf_backend import save_hf_model, verify_hf_model
from posttrain_lib.checkpoint.hf_files import INDEX_FILE, read_headers
from posttrain_lib.errors import ModelError
from posttrain_lib.models.hf_decoder import HFDecoder, as_decoder, load_hf_decoder
from posttrain_lib.models.hf_spec import hf_spec_from_folder
from tests.support.hf_models import HF_CASES, write_hf_model


def load(folder: Path) -> HFDecoder:
    return load_hf_decoder(hf_spec_from_folder(folder), folder)


@pytest.mark.parametrize("model_type", HF_CASES)
def test_a_decoder_passes(tmp_path: Path, model_type: str) -> None:
    report = verify_hf_model(write_hf_model(model_type, tmp_path / "hf"))
    assert report.passed, report.checks
    assert (report.family, report.tier) == (model_type, "hf")
    assert [check.name for check in report.checks] == [
        "logits through the output head",
        "packed = alone, bits",
        "no token sees a later one",
        "gradients are finite",
        "export",
    ]
    assert report.noise_floor > 0
    assert set(report.files) == {"config.json", "generation_config.json", "model.safetensors"}
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_bidirectional_class_is_caught(tmp_path: Path) -> None:
    report = verify_hf_model(write_hf_model("bert", tmp_path / "hf", is_decoder=False))
    assert [check.name for check in report.checks if not check.passed] == ["no token sees a later one"]


def test_a_document_that_sees_its_neighbour_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_row(self: HFDecoder, documents: list[torch.Tensor], own: list[int]) -> torch.Tensor:
        return self._last_hidden(torch.cat(documents)[None])[0]

    monkeypatch.setattr(HFDecoder, "_run", one_row)
    report = verify_hf_model(write_hf_model("gpt_neox", tmp_path / "hf"))
    failed = [check.name for check in report.checks if not check.passed]
    assert failed == ["logits through the output head", "packed = alone, bits"]


def test_a_wrong_head_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFDecoder, "_measure_head", lambda self: (1.0, None))
    report = verify_hf_model(write_hf_model("cohere", tmp_path / "hf"))
    assert [check.name for check in report.checks if not check.passed] == ["logits through the output head"]


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = write_hf_model("stablelm", tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN or infinite") as caught:
        verify_hf_model(folder)
    assert "layers.1.mlp.up_proj" in str(caught.value.where)


def test_memory_and_tokenizer_are_checked(tmp_path: Path) -> None:
    folder = write_hf_model("stablelm", tmp_path / "hf")
    with pytest.raises(ModelError, match="memory limit"):
        verify_hf_model(folder, memory_limit_bytes=1000)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 96}}}))
    with pytest.raises(ModelError, match="tokenizer is larger"):
        verify_hf_model(folder)


@pytest.mark.parametrize(("model_type", "dtype"), [("gpt2", "float32"), ("granitemoe", "bfloat16")])
def test_what_is_written_loads_with_equal_logits(tmp_path: Path, model_type: str, dtype: str) -> None:
    """After a change of all weights, in two shards, tied and joined tensors included."""
    source, out = write_hf_model(model_type, tmp_path / "hf"), tmp_path / "out"
    (source / "tokenizer_config.json").write_text('{"kept": "byte for byte"}')
    model = load(source)
    kind = getattr(torch, dtype)
    state = {name: (value * 1.25).to(kind).float() for name, value in model.state_dict().items()}
    save_hf_model(model, state, source, out, dtype, max_shard_bytes=40_000)
    assert (out / INDEX_FILE).is_file()
    assert (out / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    written = json.loads((out / "config.json").read_text())
    assert written == {**json.loads((source / "config.json").read_text()), "dtype": dtype}
    assert set(read_headers(out)) == set(read_headers(source))
    assert exported_dtype(out, "source", "hf") == dtype
    model.load_state_dict(state)
    (check,) = compare_with_reference(as_decoder(model), out, [[5, 6, 7, 8], [9, 10]])
    assert check.passed, check
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    source = write_hf_model("stablelm", tmp_path / "hf")
    model = load(source)
    state = dict(model.state_dict())
    name = "inner.model.norm.weight"
    with pytest.raises(ModelError, match="not that of the model"):
        save_hf_model(model, {key: state[key] for key in state if key != name}, source, tmp_path / "out", "float32")
    with pytest.raises(ModelError, match="NaN or infinite in the dtype") as caught:
        save_hf_model(model, {**state, name: state[name] + 1e6}, source, tmp_path / "out", "float16")
    assert caught.value.where == name
