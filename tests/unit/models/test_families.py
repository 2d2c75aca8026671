from __future__ import annotations

import dataclasses
import json

import pytest

from posttrain_lib.errors import ModelError
from posttrain_lib.models.families import FAMILIES, get_family, spec_from_config, spec_from_folder
from posttrain_lib.ops.rope import inverse_frequencies

SUPPORTED = ["llama-3.1-8b", "llama-3.2-1b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-0.6b"]

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


def _agrees_with_transformers(content):
    """Our mapping against what transformers computes from the same config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ours = spec_from_config(content).config
    raw = dict(content)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert getattr(ours, name) == getattr(config, name), name
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    rotary = type(theirs.model.rotary_emb)(config)
    assert torch.equal(rotary.inv_freq, inverse_frequencies(ours.rope, ours.head_dim))
    assert rotary.attention_scaling == 1.0
    attention = theirs.model.layers[0].self_attn
    assert ours.head_dim == attention.head_dim
    assert ours.attention_scale == attention.scaling
    assert ours.windows == tuple(getattr(layer.self_attn, "sliding_window", None) for layer in theirs.model.layers)
    spec = spec_from_config(content)
    names = spec.hf_names()
    shapes = {name: tuple(value.shape) for name, value in theirs.named_parameters()}
    assert {names[name]: shape for name, shape in spec.parameter_shapes().items()} == shapes


@pytest.mark.parametrize("name", SUPPORTED)
def test_published_models_map_as_transformers_maps_them(name, real_data):
    _agrees_with_transformers(json.loads((real_data / "model_configs" / name / "config.json").read_text()))


def test_tiny_models_map_as_transformers_maps_them(tiny):
    _agrees_with_transformers(json.loads((tiny / "config.json").read_text()))


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
    ],
    ids=lambda content: "-".join(f"{k}" for k in content if k not in LLAMA) or "plain",
)
def test_defaults_and_old_spellings(content):
    _agrees_with_transformers(content)


def test_other_published_models_are_refused_by_name(real_data):
    refused = 0
    for folder in sorted((real_data / "model_configs").iterdir()):
        if folder.name in SUPPORTED:
            continue
        with pytest.raises(ModelError, match="not supported") as caught:
            spec_from_folder(folder)
        assert "model_type" in caught.value.where
        assert "qwen3" in caught.value.expected
        refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_scaling.beta_fast"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        (
            {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor",
        ),
        ({"rope_theta": -1}, "rope_theta"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"model_type": "mixtral"}, "model_type"),
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
def test_every_weight_has_one_name_and_one_sharding(name):
    family = get_family(name)
    ours, theirs = zip(*family.weight_map, strict=True)
    assert len(set(ours)) == len(ours) == len(set(theirs))
    assert set(family.sharding_plan) == set(ours)
    assert family.sharding_plan["layers.{n}.attention.o_proj.weight"] == "row"
    assert family.sharding_plan["norm.weight"] == "replicate"
    assert dataclasses.is_dataclass(family)
