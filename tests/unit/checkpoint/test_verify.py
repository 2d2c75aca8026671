from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain_lib.checkpoint import verify_modules
from posttrain_lib.checkpoint.hf import iter_hf_weights, load_hf_weights
from posttrain_lib.checkpoint.verify import NOISE_FACTOR, shrink_windows, verify_light, verify_model
from posttrain_lib.checkpoint.verify_blocks import StoredWeights, build_block, verify_blocks
from posttrain_lib.checkpoint.verify_modules import Documents, one_layer_spec
from posttrain_lib.errors import ModelError
from posttrain_lib.models import blocks
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder

LENGTHS = (7, 1, 40)


def _documents(spec):
    return Documents.random(spec, LENGTHS, seed=3)


def _loaded(spec, folder):
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    return model


def _failed(report):
    return [check.name for check in report.checks if not check.passed]


@pytest.mark.parametrize("tier", ["light", "blocks"])
def test_every_tiny_model_passes(tiny, tier):
    report = verify_model(tiny, tier=tier, seed=1)
    assert report.passed, [(check.name, check.value, check.limit) for check in report.checks]
    assert report.tier == tier
    assert report.first_wrong_module is None
    assert 0 < report.difference <= NOISE_FACTOR * report.noise_floor + 2**-23 * report.logit_scale
    names = [check.name for check in report.checks]
    assert "weights round trip" in names
    assert any(name.startswith("packed = alone, gradients") for name in names)
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False))["passed"] is True
    assert set(report.files) == {"config.json", "model.safetensors", "tokenizer_config.json"}


def test_the_report_is_reproducible(tiny_folder):
    folder = tiny_folder("qwen2")
    first, again = (verify_model(folder, seed=5, memory_limit_bytes=10**9).to_dict() for _ in range(2))
    assert first == again


def test_each_kind_of_layer_has_its_gradient_check(tiny_folder):
    report = verify_model(tiny_folder("qwen2-windows"))
    reasons = [check.reason for check in report.checks if "gradients" in check.name]
    assert len(reasons) == 2
    assert any("window of 5" in reason for reason in reasons)


def test_light_goes_block_by_block_where_memory_is_short(tiny_folder, monkeypatch):
    folder = tiny_folder("llama")
    assert verify_model(folder, memory_limit_bytes=10**9).tier == "light"
    monkeypatch.setattr("posttrain_lib.checkpoint.verify_blocks._HEAD_ROWS", 16)
    spec = spec_from_folder(folder)
    from posttrain_lib.checkpoint.verify_blocks import block_bytes

    monkeypatch.setattr("posttrain_lib.checkpoint.verify._BYTES_LIGHT", 10_000)
    report = verify_model(folder, memory_limit_bytes=block_bytes(spec))
    assert report.tier == "blocks"
    assert report.passed
    with pytest.raises(ModelError, match="memory limit"):
        verify_model(folder, tier="blocks", memory_limit_bytes=block_bytes(spec) - 1)


def test_a_damaged_folder_never_reaches_the_comparison(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        verify_model(folder)


# ---- seeded faults: each must be caught, and the first wrong module named ----


def _config(**changes):
    return lambda spec: dataclasses.replace(spec, config=dataclasses.replace(spec.config, **changes))


def _wrong_theta(spec):
    return _config(rope=dataclasses.replace(spec.config.rope, theta=spec.config.rope.theta * 1.01))(spec)


def _transpose(layer):
    weight = layer.attention.o_proj.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.t().contiguous()


def _norm_eps(layer):
    layer.post_attention_norm.eps = 1e-3


def _scale(layer):
    layer.attention.scale *= 1.02


def _swap(layer):
    mlp = layer.mlp
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = mlp.up_proj.weight.data, mlp.gate_proj.weight.data


def _one_weight(layer):
    layer.mlp.down_proj.weight.data[2, 2] += 0.01


SPEC_FAULTS = {
    # name: (model, fault in the spec, first wrong module, words of the explanation)
    "wrong rope theta": ("llama", _wrong_theta, "rotary_embedding", "constant"),
    "llama3 scaling ignored": (
        "llama-3.2",
        lambda spec: _config(rope=dataclasses.replace(spec.config.rope, kind="default"))(spec),
        "rotary_embedding",
        "constant",
    ),
    "missing qkv bias": ("qwen2", _config(qkv_bias=False), "layers.0.attention.q_proj", "exists only in transformers"),
    "no qk-norm": ("qwen3", _config(qk_norm=False), "layers.0.attention.q_norm", "only transformers has this module"),
    "wrong norm eps": ("llama", _config(rms_norm_eps=1e-3), "layers.0.input_norm", "constant"),
    "wrong tie": ("llama", _config(tie_word_embeddings=True), "lm_head", "embed_tokens.weight"),
    "sliding window ignored": ("qwen2-windows", _config(windows=(None, None, None)), "layers.1.attention", "mask"),
    "window off by one": ("qwen2-windows", _config(windows=(None, 6, 6)), "layers.1.attention", "mask"),
}
LAYER_FAULTS = {
    # name: (model, layer, fault in our layer, first wrong module, words of the explanation)
    "transposed square weight": ("llama", 1, _transpose, "attention.o_proj", "o_proj.weight is transposed"),
    "norm eps of one layer": ("llama", 1, _norm_eps, "post_attention_norm", "constant"),
    "wrong scale": ("qwen3", 2, _scale, "attention", "scale"),
    "gate and up swapped": ("qwen2", 1, _swap, "mlp.gate_proj", "gate_proj.weight has other values"),
    "one weight off": ("llama", 0, _one_weight, "mlp.down_proj", "down_proj.weight has other values"),
}


def _copied(spec, folder):
    """Our model of a wrong spec, with whatever stored weights it has a place for."""
    stored = dict(iter_hf_weights(spec_from_folder(folder), folder))
    model = build_model(spec)
    model.load_state_dict({name: stored[name] for name in spec.parameter_shapes()})
    return model


@pytest.mark.parametrize("fault", sorted(SPEC_FAULTS))
def test_light_catches_faults_of_the_definition(fault, tiny_folder):
    name, break_spec, module, words = SPEC_FAULTS[fault]
    folder = tiny_folder(name)
    right = shrink_windows(spec_from_folder(folder))
    wrong = break_spec(right)
    model = _copied(wrong, folder)
    # The gate is given the folder's spec: what is wrong is the model that was built.
    report = verify_light(model, right, folder, _documents(right))
    assert "logits" in _failed(report)
    assert report.first_wrong_module == module
    assert words in report.detail
    assert report.difference > 10 * NOISE_FACTOR * report.noise_floor  # no fault hides near the limit
    assert not report.passed


@pytest.mark.parametrize("fault", sorted(LAYER_FAULTS))
def test_both_tiers_catch_faults_of_a_layer(fault, tiny_folder):
    name, place, break_layer, module, words = LAYER_FAULTS[fault]
    folder = tiny_folder(name)
    spec = spec_from_folder(folder)
    model = _loaded(spec, folder)
    break_layer(model.layers[place])

    def block(spec, weights, layer):
        made = build_block(spec, weights, layer)
        if layer == place:
            break_layer(made.layers[0])
        return made

    light = verify_light(model, spec, folder, _documents(spec))
    assert "logits" in _failed(light)
    blocks_report = verify_blocks(spec, folder, _documents(spec), block=block)
    assert "blocks" in _failed(blocks_report)
    for report in (light, blocks_report):
        assert report.first_wrong_module == f"layers.{place}.{module}"
        assert words in report.detail
        assert report.modules[-1].name == report.first_wrong_module
        assert all(item.passed for item in report.modules[:-1])


def test_a_wrong_final_norm_is_caught(tiny_folder):
    folder = tiny_folder("qwen3-untied")
    spec = spec_from_folder(folder)
    model = _loaded(spec, folder)
    model.norm.weight.data[3] *= 1.001
    report = verify_light(model, spec, folder, _documents(spec))
    assert report.first_wrong_module == "norm"
    assert "norm.weight has other values" in report.detail


def _interleaved(monkeypatch):
    """Query heads dealt out to the key heads in turn instead of in runs: a wrong grouping with right shapes."""
    right = blocks.packed_attention

    def wrong(query, key, value, *args, **kwargs):
        group = query.shape[1] // key.shape[1]
        order = torch.arange(query.shape[1]).view(group, -1).t().flatten()
        return right(query[:, order], key, value, *args, **kwargs)[:, order.argsort()]

    monkeypatch.setattr(blocks, "packed_attention", wrong)


def test_wrong_head_grouping_is_caught(tiny_folder, monkeypatch):
    folder = tiny_folder("llama")
    spec = spec_from_folder(folder)
    _interleaved(monkeypatch)
    report = verify_light(_loaded(spec, folder), spec, folder, _documents(spec))
    assert report.first_wrong_module == "layers.0.attention"
    assert "head grouping" in report.detail
    report = verify_blocks(spec, folder, _documents(spec))
    assert report.first_wrong_module == "layers.0.attention"


def test_a_leak_between_documents_is_caught(tiny_folder, monkeypatch):
    folder = tiny_folder("qwen3")
    spec = spec_from_folder(folder)
    right = blocks.packed_attention

    def leaky(query, key, value, layout, longest, **kwargs):
        tokens = query.shape[0]
        whole = torch.tensor([0, tokens], dtype=torch.int32)
        return right(query, key, value, whole, tokens, **kwargs)

    monkeypatch.setattr(blocks, "packed_attention", leaky)
    expected = {"packed = alone, gradients, layer 0"}
    for report in (
        verify_light(_loaded(spec, folder), spec, folder, _documents(spec)),
        verify_blocks(spec, folder, _documents(spec)),
    ):
        failed = set(_failed(report))
        assert expected <= failed
        assert {"packed = alone, logits", "packed = alone, hidden states"} & failed


def test_wrong_positions_are_caught(tiny_folder, monkeypatch):
    folder = tiny_folder("llama")
    spec = spec_from_folder(folder)
    model = _loaded(spec, folder)
    right = model.rope_tables
    monkeypatch.setattr(model, "rope_tables", lambda positions: right(positions.cumsum(0)))
    report = verify_light(model, spec, folder, _documents(spec))
    assert report.first_wrong_module == "rotary_embedding"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_computes_nan_does_not_pass(value, tiny_folder):
    folder = tiny_folder("llama")
    spec = spec_from_folder(folder)
    model = _loaded(spec, folder)
    model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    report = verify_light(model, spec, folder, _documents(spec))
    assert not report.passed
    assert report.first_wrong_module == "layers.1.mlp.up_proj"
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_wrong_bit_that_no_logit_shows_is_caught(tiny_folder):
    folder = tiny_folder("llama")
    spec = spec_from_folder(folder)
    model = _loaded(spec, folder)
    weight = model.embed_tokens.weight.data
    unseen = sorted(set(range(spec.config.vocab_size)) - set(_documents(spec).token_ids.tolist()))[0]
    weight[unseen, 0] = torch.nextafter(weight[unseen, 0], torch.tensor(9.0))
    report = verify_light(model, spec, folder, _documents(spec))
    assert _failed(report) == ["weights round trip"]
    assert "embed_tokens.weight" in next(check.value for check in report.checks if not check.passed)


BLOCK_FAULTS = sorted(set(SPEC_FAULTS) - {"wrong tie", "wrong rope theta", "llama3 scaling ignored"})


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_blocks_name_the_same_module_as_light(fault, tiny_folder):
    name, break_spec, module, words = SPEC_FAULTS[fault]
    folder = tiny_folder(name)
    spec = shrink_windows(spec_from_folder(folder))

    def block(spec, weights, layer):
        made = build_model(one_layer_spec(break_spec(spec), layer))
        stored = weights.layer(layer)
        made.layers[0].load_state_dict({name: stored[name] for name in made.layers[0].state_dict()})
        return made

    report = verify_blocks(spec, folder, _documents(spec), block=block)
    assert "blocks" in _failed(report)
    assert report.first_wrong_module == module
    assert words in report.detail


@pytest.mark.parametrize("fault", ["wrong tie", "wrong rope theta"])
def test_blocks_catch_faults_outside_the_blocks(fault, tiny_folder):
    name, break_spec, module, _ = SPEC_FAULTS[fault]
    folder = tiny_folder(name)
    spec = spec_from_folder(folder)
    report = verify_blocks(break_spec(spec), folder, _documents(spec))
    assert report.first_wrong_module == module
    assert not report.passed


def test_the_limit_is_the_reference_own_noise():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert verify_modules.noise_limit(1e-6, exact) == pytest.approx(NOISE_FACTOR * 1e-6 + 4 * 2**-23)
    assert verify_modules.noise_limit(0.0, exact) == pytest.approx(4 * 2**-23)


def test_documents_fit_the_model(tiny_folder):
    spec = spec_from_folder(tiny_folder("llama"))
    short = dataclasses.replace(spec, config=dataclasses.replace(spec.config, max_position_embeddings=10))
    documents = Documents.random(short, LENGTHS, seed=0)
    assert documents.lengths == (7, 1, 10)
    assert int(documents.token_ids.max()) < spec.config.vocab_size
    assert documents.positions.tolist() == [*range(7), 0, *range(10)]


def test_stored_weights_are_those_of_the_file(tiny_folder):
    folder = tiny_folder("qwen3")
    spec = spec_from_folder(folder)
    weights = StoredWeights(spec, folder)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(weights["norm.weight"], stored["model.norm.weight"])
    assert torch.equal(weights.layer(2)["mlp.up_proj.weight"], stored["model.layers.2.mlp.up_proj.weight"])
