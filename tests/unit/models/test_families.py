from __future__ import annotations

import copy
import json

import pytest
import torch

from posttrain_lib.adapters.hf_reference import load_reference
from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.checkpoint.hf_files import read_headers
from posttrain_lib.checkpoint.verify_documents import Documents, largest
from posttrain_lib.conversion.family_test import TINY_SIZES
from posttrain_lib.conversion.reference_facts import random_reference
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import FAMILIES, get_family, spec_from_config, spec_from_folder
from posttrain_lib.models.families.shared import sharding_plan
from posttrain_lib.models.spec import parameter_count
from posttrain_lib.models.weights import stored_shapes
from posttrain_lib.ops.rope import inverse_frequencies
from tests.support.tiny_models import CASES

UNSUPPORTED = ["gemma-4-26b-a4b", "glm-5"]
#: published parameter counts, of the model cards and transformers' own models, in billions
PUBLISHED = {
    "deepseek-v3": 671.03, "gemma-2-2b": 2.61, "gemma-3-1b": 1.0, "glm-4-9b-0414": 9.4, "gpt-oss-120b": 116.83,
    "gpt-oss-20b": 20.91, "llama-3.1-8b": 8.03, "llama-3.2-1b": 1.24, "mistral-7b-v0.3": 7.25,
    "mixtral-8x7b-v0.1": 46.7, "olmo-2-1124-7b": 7.3, "olmo-3-1025-7b": 7.3, "phi-3-mini-4k": 3.82, "phi-4": 14.66,
    "qwen2.5-0.5b": 0.49, "qwen2.5-7b": 7.62, "qwen3-0.6b": 0.6, "qwen3-235b-a22b": 235.09, "qwen3-30b-a3b": 30.53,
    "smollm3-3b": 3.08,
}  # fmt: skip

LLAMA = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8}


def _config(folder):
    """config.json as it would be without the quantisation of the files that it was published with."""
    content = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in content.items() if key not in ("quantization_config", "auto_map")}


def _agrees_with_transformers(content):
    """Our mapping against what transformers computes from the same config.json, where each can be read off."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = spec_from_config(content).config
    raw = dict(content)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(config, name), name
    assert ours.norm.eps == config.rms_norm_eps
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    rotary = type(theirs.model.rotary_emb)(config)
    tables = [value for name, value in rotary.named_buffers() if name.endswith("inv_freq") and "original" not in name]
    assert len(tables) == len(ours.ropes)
    for rope in ours.ropes:
        frequencies = inverse_frequencies(rope)
        # Of longrope's two sets transformers begins with the one for short documents.
        known = frequencies[0] if rope.kind == "longrope" else frequencies
        assert any(value.shape == known.shape and torch.equal(value, known) for value in tables)
    if len(tables) == 1:
        assert ours.ropes[0].attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    for own, layer in zip(ours.layers, theirs.model.layers, strict=True):
        attention = getattr(layer, "self_attn", None)
        if attention is not None:
            assert own.attention.scale == pytest.approx(attention.scaling, rel=1e-12)
            assert own.attention.window == getattr(attention, "sliding_window", own.attention.window)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    # DeepSeek's correction of the routing is a buffer there.
    count += sum(value.numel() for name, value in theirs.named_buffers() if name.endswith("correction_bias"))
    assert parameter_count(ours) == count


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_map_as_transformers_maps_them(name, real_data):
    content = _config(real_data / "model_configs" / name)
    _agrees_with_transformers(content)
    assert parameter_count(spec_from_config(content).config) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.005)


@pytest.mark.parametrize("case", sorted(CASES))
def test_tiny_models_map_as_transformers_maps_and_writes_them(case, family_folder):
    folder = family_folder(case)
    _agrees_with_transformers(json.loads((folder / "config.json").read_text()))
    written = {name: entry.shape for name, entry in read_headers(folder).items()}
    assert stored_shapes(spec_from_folder(folder).pieces) == written


def test_every_family_has_a_tiny_model_with_its_peculiarities():
    assert {fields["model_type"] for fields in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    "content",
    [
        LLAMA,
        {**LLAMA, "rope_theta": 123.0},
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**QWEN2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {**QWEN2, "use_sliding_window": True, "max_window_layers": 0},
        {**QWEN2, "sliding_window": 3, "layer_types": ["full_attention", "full_attention"]},
        {
            **QWEN3,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {key: value for key, value in QWEN3.items() if key != "head_dim"},
        {**LLAMA, "model_type": "smollm3", "num_attention_heads": 8, "num_key_value_heads": None, "pad_token_id": 0},
        {**LLAMA, "model_type": "qwen2", "hidden_size": 128, "num_attention_heads": 64},
    ],
    ids=lambda content: "-".join(f"{k}" for k in content if k not in LLAMA) or "plain",
)
def test_defaults_and_old_spellings(content):
    _agrees_with_transformers(content)


@pytest.mark.parametrize(
    ("case", "left_out"), [*((case, "") for case in CASES), ("gpt_oss", "rope_parameters"), ("gemma3", "layer_types")]
)
def test_what_a_file_leaves_out_is_what_transformers_takes_it_for(case, left_out, tmp_path):
    """The files that transformers writes state everything; these state what is peculiar and nothing else."""
    content = {key: value for key, value in {**TINY_SIZES, **CASES[case]}.items() if key != left_out}
    random_reference(copy.deepcopy(content)).save_pretrained(tmp_path)  # transformers fills in nested fields
    (tmp_path / "config.json").write_text(json.dumps(content))
    spec = spec_from_folder(tmp_path)
    model = build_model(spec)
    load_hf_weights(model, spec, tmp_path)
    documents = Documents.random(spec, (40, 1, 17), seed=0)
    theirs = documents.reference_logits(load_reference(tmp_path, dtype=torch.float32))
    assert largest(documents.packed_logits(model) - theirs) < 1e-4 * largest(theirs)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_published_models_are_refused_by_name(name, real_data):
    with pytest.raises(ModelError, match="not supported") as caught:
        spec_from_folder(real_data / "model_configs" / name)
    assert "model_type" in caught.value.where
    assert "qwen3" in caught.value.expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_parameters.low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_parameters.beta_fast"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": -0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures"),
        ({"model_type": "bert"}, "model_type"),
    ],
)
def test_what_is_not_supported_is_refused_naming_the_field(change, field):
    with pytest.raises(ModelError) as caught:
        spec_from_config({**LLAMA, **change}, where="config.json")
    assert caught.value.where == f"config.json: {field}"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
    ],
)
def test_impossible_windows_are_refused(change, field):
    with pytest.raises(ModelError) as caught:
        spec_from_config({**QWEN2, **change})
    assert caught.value.where.endswith(field)


@pytest.mark.parametrize(
    ("case", "change", "field"),
    [
        ("smollm3", {"sliding_window": 7, "layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ("gemma2", {"sliding_window": None}, "layer_types"),
        ("gemma3", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping"),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling"),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters"),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_fields_that_contradict_or_that_the_modelling_code_does_not_read_are_refused(case, change, field):
    with pytest.raises(ModelError) as caught:
        spec_from_config({**TINY_SIZES, **CASES[case], **change})
    assert caught.value.where.endswith(f": {field}")


@pytest.mark.parametrize("name", [name for name in LLAMA if name != "model_type"])
def test_a_missing_size_is_refused(name):
    with pytest.raises(ModelError) as caught:
        spec_from_config({key: value for key, value in LLAMA.items() if key != name})
    assert caught.value.where.endswith(name)


def test_harmless_fields_pass():
    spec_from_config(
        {**LLAMA, "torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1, "eos_token_id": [1, 2]}
    )


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_broken_config_file_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        spec_from_folder(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        spec_from_folder(tmp_path)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_parameter_has_one_rule_and_one_sharding(name):
    rules = get_family(name).rules
    ours = [parameter for rule in rules for parameter in rule.ours]
    theirs = [rule.theirs for rule in rules]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    plan = sharding_plan(rules)
    assert set(plan) == set(ours)
    assert plan["layers.{n}.attention.o_proj.weight"] == "row"
    assert plan["norm.weight"] == "replicate"
