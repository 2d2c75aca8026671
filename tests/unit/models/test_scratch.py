from __future__ import annotations

import hashlib
import json

import pytest
import torch

from posttrain_lib.checkpoint.hf import check_hf_folder
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ModelError
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.scratch import initial_weights, write_scratch_model

ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = (message["content"] for row in generate_rows(60, 0) for message in row["messages"])
    build_tokenizer(texts, 320, folder)
    return folder


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_folder_loads_in_transformers(family, tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    write_scratch_model(family, ARCHITECTURE, tokenizer, 0, tmp_path / "model")
    check_hf_folder(tmp_path / "model")
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.vocab_size == len(words)
    assert config.eos_token_id == words.eos_token_id
    assert config.pad_token_id == words.pad_token_id
    assert config.dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == config.architectures[0]
    assert model.generation_config.eos_token_id == words.eos_token_id
    for path in tokenizer.iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


def test_a_head_may_have_another_size_where_transformers_class_does_not_list_it(tokenizer, tmp_path):
    """Qwen3-MoE's released models have heads of 128 whatever hidden size / heads comes to."""
    from transformers import AutoModelForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    write_scratch_model("qwen3_moe", {**ARCHITECTURE, **experts, "head_dim": 16}, tokenizer, 0, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (4 * 16, 32)
    assert spec_from_folder(tmp_path / "model").config.layers[0].attention.head_dim == 16


def test_the_seed_decides_every_byte_whatever_the_threads(tokenizer, tmp_path):
    threads = torch.get_num_threads()
    digests = []
    try:
        for name, seed, count in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            write_scratch_model("qwen3", ARCHITECTURE, tokenizer, seed, tmp_path / name)
            digests.append(_digest(tmp_path / name / "model.safetensors"))
    finally:
        torch.set_num_threads(threads)
    assert digests[0] == digests[1] != digests[2]


def test_initial_weights_have_the_stated_spread(tokenizer, tmp_path):
    write_scratch_model("llama", {**ARCHITECTURE, "hidden_size": 128}, tokenizer, 0, tmp_path / "model")
    for name, tensor in initial_weights(spec_from_folder(tmp_path / "model"), 0):
        if tensor.dim() == 1:
            assert bool((tensor == 1).all())
        else:
            wanted = 0.02 / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # sqrt(2 * 2 layers)
            assert float(tensor.std()) == pytest.approx(wanted, rel=0.1)  # some thousand samples: 2 %


def test_a_padded_vocabulary_is_kept(tokenizer, tmp_path):
    write_scratch_model("qwen2", {**ARCHITECTURE, "vocab_size": 512}, tokenizer, 0, tmp_path / "model")
    assert spec_from_folder(tmp_path / "model").config.vocab_size == 512


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hiden_size": 32}, "hidden_size"),
        ({"vocab_size": 10}, "smaller than the tokenizer"),
        ({"eos_token_id": 3}, "not the run file's"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"attention_dropout": 0.5}, "attention_dropout"),
    ],
)
def test_what_cannot_be_is_refused(change, words, tokenizer, tmp_path):
    with pytest.raises(ModelError, match=words):
        write_scratch_model("qwen3", {**ARCHITECTURE, **change}, tokenizer, 0, tmp_path / "model")


def test_an_unknown_family_is_refused(tokenizer, tmp_path):
    with pytest.raises(ModelError, match="not supported"):
        write_scratch_model("bert", ARCHITECTURE, tokenizer, 0, tmp_path / "model")


def test_no_tokenizer_no_model(tmp_path):
    with pytest.raises(ModelError, match="tokenizer folder"):
        write_scratch_model("qwen3", ARCHITECTURE, tmp_path, 0, tmp_path / "model")


def test_config_names_a_serving_architecture(tokenizer, tmp_path):
    write_scratch_model("qwen3", {**ARCHITECTURE, "head_dim": 16}, tokenizer, 0, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["architectures"] == ["Qwen3ForCausalLM"]
    assert content["model_type"] == "qwen3"
    assert content["head_dim"] == 16
