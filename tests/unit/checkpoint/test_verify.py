from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain_lib.checkpoint import hf
from posttrain_lib.checkpoint.verify import (
    _LENGTHS,
    light_bytes,
    shrink_windows,
    verify_blocks,
    verify_light,
    verify_model,
)
from posttrain_lib.checkpoint.verify_blocks import FolderWeights, block_bytes, build_part
from posttrain_lib.checkpoint.verify_documents import NOISE_FACTOR, Documents, noise_limit
from posttrain_lib.checkpoint.verify_report import Finding, merged
from posttrain_lib.checkpoint.verify_routing import swap_limit
from posttrain_lib.errors import ModelError
from posttrain_lib.models.families import spec_from_folder
from tests.support.tiny_models import CASES, write_tiny_model

#: block by block in the plain run: dense and tied, fused, two rotary embeddings, NoPE, experts in three layouts
BLOCKS = ("llama, tied", "gemma3", "phi3", "smollm3", "gpt_oss", "deepseek_v3", "qwen3_next")
LENGTHS = (40, 1, 17)
ALWAYS = {
    "logits, float32", "logits, bfloat16, mean", "logits, bfloat16, largest", "norms, bfloat16", "gradients",
    "packed = alone", "packed = alone, gradients", "far positions", "cached = uncached", "LoRA at init = base",
    "weights round trip",
}  # fmt: skip


def _shown(report):
    return [(check.name, check.value, check.limit, check.reason) for check in report.checks if not check.passed]


def _check(report, name):
    return next(check for check in report.checks if check.name == name)


def _verified(folder, case, tier):
    report = verify_model(folder, tier=tier, seed=1)
    assert report.passed, _shown(report)
    assert report.tier == tier
    assert report.first_wrong_module is None
    names = {check.name for check in report.checks}
    blocks = {"hidden states, float32", "hidden states, bfloat16, mean", "hidden states, bfloat16, largest"}
    experts = any(hasattr(layer.mlp, "num_experts") for layer in spec_from_folder(folder).config.layers)
    routing = {"routing, float32", "routing, bfloat16"} if experts else set()
    assert names == ALWAYS | routing | ({"export"} if tier == "light" else blocks)
    assert 0 < report.difference <= NOISE_FACTOR * report.noise_floor + 2**-23 * report.logit_scale
    return report


@pytest.mark.parametrize("case", CASES)
def test_every_family_passes_whole(case, family_folder):
    _verified(family_folder(case), case, "light")


@pytest.mark.parametrize("case", BLOCKS)
def test_families_pass_block_by_block(case, family_folder):
    _verified(family_folder(case), case, "blocks")


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(CASES) - set(BLOCKS)))
def test_every_other_family_passes_block_by_block(case, family_folder):
    _verified(family_folder(case), case, "blocks")


@pytest.mark.parametrize("case", ["qwen3", "deepseek_v3"])
def test_bfloat16_folders_pass(case, tmp_path):
    """What is published: bfloat16, the router's correction apart from it."""
    folder = write_tiny_model(case, tmp_path / "model", torch.bfloat16)
    report = verify_model(folder, memory_limit_bytes=10**9)
    assert report.passed, _shown(report)


def test_the_report_is_plain_and_reproducible(family_folder):
    first, again = (verify_model(family_folder("qwen2"), seed=5, memory_limit_bytes=10**9).to_dict() for _ in range(2))
    assert first == again
    assert json.loads(json.dumps(first, allow_nan=False))["passed"] is True
    assert set(first["files"]) == {"config.json", "generation_config.json", "model.safetensors"}


def test_light_goes_block_by_block_where_memory_is_short(family_folder, monkeypatch):
    folder = family_folder("llama")
    spec = spec_from_folder(folder)
    whole = light_bytes(spec, Documents.random(spec, _LENGTHS, 0))
    assert block_bytes(spec) < whole
    report = verify_model(folder, memory_limit_bytes=whole - 1)
    assert report.tier == "blocks"
    assert report.memory_estimate_bytes == block_bytes(spec)
    assert report.passed
    with pytest.raises(ModelError, match="memory limit"):
        verify_model(folder, tier="blocks", memory_limit_bytes=block_bytes(spec) - 1)


# ---- faults in whole reports; each check's own are in test_verify_faults ----


def _loaded(folder):
    spec = spec_from_folder(folder)
    return spec, build_part(spec, FolderWeights(spec, folder)), Documents.random(spec, LENGTHS, seed=3)


@pytest.mark.parametrize("case", ["phi3", "qwen3_moe"])
def test_both_tiers_name_the_first_wrong_module(case, family_folder):
    folder = family_folder(case)
    spec, model, documents = _loaded(folder)
    with torch.no_grad():
        model.layers[2].attention.v_proj.weight[3, 3] += 0.01

    def build(own, stored):
        made = build_part(own, stored)
        if spec.config.layers[2:3] == own.config.layers and torch.equal(
            stored("layers.0.attention.v_proj.weight"), FolderWeights(spec, folder)("layers.2.attention.v_proj.weight")
        ):
            made.layers[0].attention.v_proj.weight.data[3, 3] += 0.01
        return made

    light, blocks = verify_light(model, spec, folder, documents), verify_blocks(spec, folder, documents, build=build)
    for report in (light, blocks):
        assert not report.passed
        assert report.first_wrong_module == "layers.2.attention.v_proj"
        assert report.detail == "parameter layers.2.attention.v_proj.weight has other values"
        assert report.modules[-1].name == report.first_wrong_module
        assert all(item.passed for item in report.modules[:-1])
        assert not _check(report, "weights round trip").passed
    assert light.modules[-1].reference == blocks.modules[-1].reference
    if case == "phi3":
        assert light.modules[-1].reference == "model.layers.2.self_attn.qkv_proj"


def test_a_wrong_end_is_caught_block_by_block(family_folder):
    folder = family_folder("granite")
    spec, _, documents = _loaded(folder)

    def build(own, stored):
        made = build_part(own, stored)
        if not own.config.layers:
            made.norm.weight.data[3] *= 1.001
        return made

    report = verify_blocks(spec, folder, documents, build=build)
    assert report.first_wrong_module == "norm"
    assert "norm.weight has other values" in report.detail


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_computes_nan_does_not_pass(value, family_folder):
    spec, model, documents = _loaded(family_folder("llama"))
    model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    report = verify_light(model, spec, family_folder("llama"), documents)
    assert not report.passed
    assert report.first_wrong_module == "layers.1.mlp.up_proj"
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_wrong_bit_that_no_logit_shows_is_caught(family_folder):
    folder = family_folder("llama")
    spec, model, documents = _loaded(folder)
    weight = model.embed_tokens.weight.data
    unseen = sorted(set(range(spec.config.vocab_size)) - set(documents.token_ids.tolist()))[0]
    weight[unseen, 0] = torch.nextafter(weight[unseen, 0], torch.tensor(9.0))
    report = verify_light(model, spec, folder, documents)
    assert [check.name for check in report.checks if not check.passed] == ["weights round trip"]
    assert report.first_wrong_module == "model.embed_tokens.weight"


def test_a_definition_that_keeps_everything_in_float32_is_caught(family_folder):
    spec, model, documents = _loaded(family_folder("gemma2"))
    spec = dataclasses.replace(spec, rules=tuple(dataclasses.replace(rule, float32=True) for rule in spec.rules))
    report = verify_light(model, spec, family_folder("gemma2"), documents)
    assert not report.passed
    assert "here alone" in _check(report, "logits, bfloat16, mean").reason


@pytest.mark.parametrize("left", ["", "{}"])
def test_a_file_that_an_export_loses_or_changes_is_caught(left, family_folder, monkeypatch):
    spec, model, documents = _loaded(family_folder("llama"))
    kept = hf.copy_side_files

    def careless(source, out):
        names = kept(source, out)
        (out / "generation_config.json").write_text(left) if left else (out / "generation_config.json").unlink()
        return names

    monkeypatch.setattr(hf, "copy_side_files", careless)
    report = verify_light(model, spec, family_folder("llama"), documents)
    assert [check.name for check in report.checks if not check.passed] == ["export"]
    assert "generation_config.json" in _check(report, "export").reason


def test_a_copy_of_the_tied_head_passes(family_folder, tmp_path):
    folder = shutil.copytree(family_folder("llama, tied"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = verify_model(folder, memory_limit_bytes=10**9)
    assert report.passed, _shown(report)


# ---- bad input ----


def test_a_damaged_folder_never_reaches_the_comparison(family_folder, tmp_path):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        verify_model(folder)


def _changed_config(family_folder, tmp_path, case="llama", **changes: Any):
    folder = shutil.copytree(family_folder(case), tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
    return folder


@pytest.mark.parametrize(
    ("method", "words"), [("mxfp4", "Mxfp4Config"), ("fp8", "FineGrainedFP8Config"), ("awq", "unquantised weights")]
)
def test_a_quantised_checkpoint_is_named_with_what_to_do(method, words, family_folder, tmp_path):
    folder = _changed_config(family_folder, tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match="quantised") as caught:
        verify_model(folder)
    assert caught.value.got == method
    assert words in caught.value.fix


def test_a_model_with_its_own_code_is_refused_unless_its_family_is_defined_here(family_folder, tmp_path):
    code = {"AutoModelForCausalLM": "modeling_odd.OddForCausalLM", "AutoConfig": "configuration_odd.OddConfig"}
    folder = _changed_config(family_folder, tmp_path, auto_map=code)
    report = verify_model(folder, memory_limit_bytes=10**9)
    assert report.passed, _shown(report)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "odd"}))
    with pytest.raises(ModelError, match="own code, which is not run") as caught:
        verify_model(folder)
    assert "modeling_odd.OddForCausalLM" in caught.value.got


def test_pickled_weights_are_refused_with_the_command_that_converts_them(family_folder, tmp_path):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors") as caught:
        verify_model(folder)
    assert f"from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(" in caught.value.fix


@pytest.mark.parametrize("kind", ["object", "list"])
def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(kind, family_folder, tmp_path):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "model")
    names = [f"t{number}" for number in range(98)]
    vocabulary = dict(zip(names, range(98), strict=True)) if kind == "object" else [[name, 0.0] for name in names]
    added = [{"id": 99, "content": "<extra>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
    with pytest.raises(ModelError, match="larger than the embedding: 3 of its tokens") as caught:
        verify_model(folder)
    assert caught.value.got == "id 96, the largest is 99"
    assert "'t96'" in caught.value.where
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        verify_model(folder)


# ---- the pieces ----


def test_the_limit_is_the_reference_own_noise():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert noise_limit(1e-6, exact) == pytest.approx(NOISE_FACTOR * 1e-6 + 4 * 2**-23)
    assert noise_limit(0.0, exact) == pytest.approx(4 * 2**-23)


def test_the_limit_on_swapped_experts_grows_like_a_count():
    assert swap_limit(0) == 4
    assert 100 < swap_limit(100) < 160


def test_findings_merge_into_the_first_that_fails_or_the_nearest_to_its_limit():
    def finding(value, limit, module):
        return Finding("a", value, limit, "reason", module)

    (check,) = merged([finding(1.0, 10.0, "x"), finding(2.0, 10.0, "y"), finding(0.0, 0.0, "z")])
    assert (check.passed, check.value, check.reason) == (True, 2.0, "y: reason")
    (check,) = merged([finding(9.0, 10.0, "x"), finding(float("nan"), 10.0, "y"), finding(99.0, 10.0, "z")])
    assert (check.passed, check.reason) == (False, "y: reason")


def test_documents_fit_the_model_and_leave_padding_out(family_folder):
    spec = spec_from_folder(family_folder("llama"))
    documents = Documents.random(spec, (7, 1, 300), seed=0)
    assert documents.lengths == (7, 1, 256)
    assert set(documents.token_ids.tolist()) <= set(range(1, 96))  # 0 is padding, 96 the vocabulary
    assert {1, 95} <= set(documents.token_ids.tolist())
    assert documents.positions.tolist() == [*range(7), 0, *range(256)]


def test_windows_shrink_on_both_sides(family_folder, tmp_path):
    folder = _changed_config(family_folder, tmp_path, case="gemma3", sliding_window=200)
    spec = shrink_windows(spec_from_folder(folder))
    assert [layer.attention.window for layer in spec.config.layers] == [24, 24, None, 24]
    assert spec.hf_config["sliding_window"] == 24
    report = verify_model(folder, memory_limit_bytes=10**9)
    assert report.passed, _shown(report)
