from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain_lib.checkpoint.hf import (
    check_hf_folder,
    iter_hf_weights,
    load_hf_weights,
    read_headers,
    save_hf_folder,
    stored_tensors,
)
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of a tied model's folder, to be damaged."""
    return shutil.copytree(tiny_folder("qwen3"), tmp_path / "model")


@pytest.fixture
def sharded(tiny_folder, tmp_path):
    """The same model in several shards."""
    source = tiny_folder("llama")
    spec = spec_from_folder(source)
    out = tmp_path / "sharded"
    save_hf_folder(dict(iter_hf_weights(spec, source)), spec, source, out, "float32", max_shard_bytes=20_000)
    return out


def _rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_whole_folder_passes_with_its_digests(tiny):
    import hashlib

    digests = check_hf_folder(tiny)
    assert set(digests) == {"config.json", "tokenizer_config.json", WEIGHTS}
    assert digests[WEIGHTS] == hashlib.sha256((tiny / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hf_to_ours_to_hf_keeps_every_bit(tiny, tmp_path, dtype):
    spec = spec_from_folder(tiny)
    source = shutil.copytree(tiny, tmp_path / "source")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tiny / WEIGHTS).items()}
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    model = build_model(spec)
    load_hf_weights(model, spec, source)
    save_hf_folder(model.state_dict(), spec, source, tmp_path / "out", dtype)
    again = load_file(tmp_path / "out" / WEIGHTS)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_an_export_keeps_the_side_files_and_states_its_dtype(tiny, tmp_path):
    spec = spec_from_folder(tiny)
    source = shutil.copytree(tiny, tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_bytes(b"{{ x }}\r\n\xc3\xa9")
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (source / "optimizer.bin").write_bytes(b"no side file")
    (source / ".cache").mkdir()
    (source / ".cache" / "lock").write_bytes(b"")
    save_hf_folder(dict(iter_hf_weights(spec, source)), spec, source, tmp_path / "out", "bfloat16")
    for name in ("tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "optimizer.bin").exists()
    assert not (tmp_path / "out" / ".cache").exists()
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == {**before, "dtype": "bfloat16"}
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_an_old_config_keeps_its_spelling_of_dtype(tiny_folder, tmp_path):
    source = shutil.copytree(tiny_folder("llama"), tmp_path / "source")
    content = json.loads((source / "config.json").read_text())
    content["torch_dtype"] = content.pop("dtype")
    (source / "config.json").write_text(json.dumps(content))
    spec = spec_from_folder(source)
    save_hf_folder(dict(iter_hf_weights(spec, source)), spec, source, tmp_path / "out", "float16")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["torch_dtype"] == "float16"
    assert "dtype" not in after


def test_shards_load_here_and_in_transformers(sharded, tiny_folder):
    from transformers import AutoModelForCausalLM

    check_hf_folder(sharded)
    index = json.loads((sharded / INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files == {path.name for path in sharded.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for f in files for t in load_file(sharded / f).values())
    whole = load_file(tiny_folder("llama") / WEIGHTS)
    spec = spec_from_folder(sharded)
    model = build_model(spec)
    load_hf_weights(model, spec, sharded)
    theirs = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    written = stored_tensors(spec, model.state_dict(), torch.float32)
    assert set(written) == set(whole)
    for name, tensor in written.items():
        assert torch.equal(tensor, whole[name])
        assert torch.equal(theirs[name], whole[name])


def test_loading_holds_no_second_copy(sharded):
    spec = spec_from_folder(sharded)
    alive = []
    import weakref

    for _, tensor in iter_hf_weights(spec, sharded):
        alive.append(weakref.ref(tensor))
        del tensor
        assert sum(ref() is not None for ref in alive) <= 1


def test_a_missing_folder(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        check_hf_folder(tmp_path / "nowhere")


def test_a_missing_shard_is_named(sharded):
    name = sorted(path.name for path in sharded.glob("*.safetensors"))[1]
    (sharded / name).unlink()
    with pytest.raises(ModelError, match="missing") as caught:
        check_hf_folder(sharded)
    assert caught.value.where.endswith(name)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_shard_is_named(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    with pytest.raises(ModelError, match="truncated") as caught:
        check_hf_folder(folder)
    assert caught.value.where.endswith(WEIGHTS)


def test_trailing_bytes_are_refused(folder):
    with open(folder / WEIGHTS, "ab") as handle:
        handle.write(b"more")
    with pytest.raises(ModelError, match="belong nowhere"):
        check_hf_folder(folder)


def test_a_git_lfs_pointer_is_refused(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="truncated or no safetensors"):
        check_hf_folder(folder)


def test_a_broken_header_is_refused(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"{x:}")
    with pytest.raises(ModelError, match="does not start like safetensors"):
        check_hf_folder(folder)


def test_pickled_weights_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors") as caught:
        check_hf_folder(folder)
    assert "pytorch_model.bin" in caught.value.got


def test_a_missing_tensor_is_named(folder):
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_norm.weight"))
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.k_norm"):
        check_hf_folder(folder)


def test_an_unexpected_tensor_is_named(folder):
    _rewrite(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(3)}))
    with pytest.raises(ModelError, match="no place for") as caught:
        check_hf_folder(folder)
    assert caught.value.where.endswith("model.layers.1.self_attn.q_proj.bias")


def test_a_wrong_shape_is_named(folder):
    _rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ModelError, match="another shape") as caught:
        check_hf_folder(folder)
    assert caught.value.got == "[3]"
    assert caught.value.expected == "[32]"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    def spoil(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value

    _rewrite(folder, spoil)
    with pytest.raises(ModelError, match="NaN or infinite") as caught:
        check_hf_folder(folder)
    assert caught.value.where.endswith(f"{WEIGHTS}: model.layers.2.mlp.up_proj.weight")
    assert caught.value.got.startswith("1 of ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_a_dtype_that_cannot_be_trained_is_named(folder, dtype):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    _rewrite(folder, change)
    with pytest.raises(ModelError, match="dtype") as caught:
        check_hf_folder(folder)
    assert "model.norm.weight" in caught.value.where


def test_a_stored_copy_of_a_tied_head_must_be_a_copy(folder):
    _rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    check_hf_folder(folder)
    spec = spec_from_folder(folder)
    load_hf_weights(build_model(spec), spec, folder)
    _rewrite(folder, lambda t: t["lm_head.weight"].neg_())
    with pytest.raises(ModelError, match="ties the output head"):
        check_hf_folder(folder)


def test_a_rotary_table_of_old_files_is_ignored(folder):
    _rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    check_hf_folder(folder)


def test_an_index_that_lies_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = sorted(index["weight_map"].values())[0]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="does not hold"):
        check_hf_folder(sharded)
    (sharded / INDEX).write_text("{")
    with pytest.raises(ModelError, match="index is broken"):
        read_headers(sharded)


def test_a_state_dict_of_another_model_is_not_written(folder, tmp_path):
    spec = spec_from_folder(folder)
    state = dict(iter_hf_weights(spec, folder))
    state["norm.weight"] = torch.ones(4)
    with pytest.raises(ModelError, match=r"norm\.weight"):
        save_hf_folder(state, spec, folder, tmp_path / "out", "float32")


def test_what_overflows_is_not_written(folder, tmp_path):
    spec = spec_from_folder(folder)
    state = {name: tensor.clone() for name, tensor in iter_hf_weights(spec, folder)}
    state["norm.weight"][0] = 1e30
    with pytest.raises(ModelError, match="float16") as caught:
        save_hf_folder(state, spec, folder, tmp_path / "out", "float16")
    assert caught.value.where == "model.norm.weight"
    with pytest.raises(ModelError, match="cannot be written"):
        save_hf_folder(state, spec, folder, tmp_path / "out", "int8")
