from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain_lib.adapters.hf_reference import (
    architecture_config,
    build_reference,
    load_reference,
    reference_logits,
    tokenizer_facts,
)
from posttrain_lib.errors import ModelError


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ModelError, match="intermediate_size") as caught:
        architecture_config("qwen3", {"intermediat_size": 4})
    assert caught.value.where == "model.from_scratch.architecture.intermediat_size"


@pytest.mark.parametrize("fields", [{"rope_theta": 5.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}])
def test_old_spellings_of_rope_are_fields(fields):
    content = architecture_config("llama", fields)
    assert content["rope_parameters"]["rope_theta"] == fields.get("rope_theta", 10000.0)


def test_the_config_is_complete_enough_to_be_read_back():
    from transformers import AutoConfig

    content = architecture_config("qwen2", {"hidden_size": 64, "num_hidden_layers": 2})
    kind = content["model_type"]
    again = AutoConfig.for_model(kind, **{key: value for key, value in content.items() if key != "model_type"})
    assert again.hidden_size == 64
    assert again.num_hidden_layers == 2
    assert "tie_word_embeddings" in content


def test_a_reference_loaded_in_part_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj"):
        load_reference(folder, dtype=torch.float32)


def test_a_folder_that_transformers_cannot_load_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot load"):
        load_reference(tmp_path, dtype=torch.float32)


def test_loading_leaves_the_progress_bars_as_they_were(tiny_folder):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_reference(tiny_folder("llama"), dtype=torch.float32)
    assert logging.is_progress_bar_enabled() == before


def test_the_reference_computes_in_the_dtype_asked_for(tiny_folder):
    folder = tiny_folder("qwen3")
    token_ids = torch.arange(5)
    for dtype in (torch.float32, torch.float64):
        logits = reference_logits(load_reference(folder, dtype=dtype), token_ids)
        assert logits.dtype == dtype
        assert logits.shape == (5, 97)
    built = build_reference(json.loads((folder / "config.json").read_text()), dtype=torch.float64, num_hidden_layers=3)
    assert next(built.parameters()).dtype == torch.float64


def test_tokenizer_facts_of_a_published_tokenizer(real_data):
    facts = tokenizer_facts(real_data / "tokenizers" / "qwen3")
    assert facts["length"] == 151669
    assert facts["eos_token_id"] == 151645


def test_no_tokenizer_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="tokenizer"):
        tokenizer_facts(tmp_path)
