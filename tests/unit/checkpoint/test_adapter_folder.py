"""What goes with an adapter's files: the base, the words about it, and the proof that they are what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain_lib.checkpoint import adapter_folder
from posttrain_lib.checkpoint.adapter_folder import BASE, README_FILE, compare_adapter, put_base, write_readme
from posttrain_lib.checkpoint.adapters import ADAPTER_FILE, CONFIG_FILE, save_adapter
from posttrain_lib.errors import ModelError
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import LoraSettings, apply_lora
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from posttrain_lib.schema.manifests import Check
from tests.support.lora_cases import scramble
from tests.support.tiny_models import write_tiny_model


def trained(base: Path, out: Path, settings: LoraSettings, pad: int = 1) -> tuple[Decoder, dict[str, Tensor]]:
    """The base and adapters with values, which are saved to ``out``."""
    spec = with_padded_vocabulary(spec_from_folder(base), pad)
    adapted = apply_lora(load_model(base, pad_vocabulary_to=pad), settings)
    scramble(adapted)
    with torch.no_grad():  # as in training, rows of padding have no adapter
        for name, value in adapted.named_parameters():
            if name == "embed_tokens.lora_down":
                value[:, spec.config.vocab_size :] = 0
            elif name == "lm_head.lora_up":
                value[spec.config.vocab_size :] = 0
    save_adapter(adapted, spec, out, str(base))
    return load_model(base, pad_vocabulary_to=pad), {
        name: value.detach() for name, value in adapted.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize(
    ("case", "settings", "pad"),
    [
        ("llama", LoraSettings(4, 8.0, ("attention", "mlp", "embedding", "head")), 64),
        ("llama, tied", LoraSettings(4, 8.0, ("mlp", "embedding", "head")), 64),
        ("phi3", LoraSettings(4, 6.0, ("q_proj", "up_proj"), rslora=True), 1),
        ("phi3", LoraSettings(4, 8.0, ("q_proj", "mlp"), dora=True), 1),
        ("gpt_oss", LoraSettings(2, 4.0, ("attention", "experts")), 1),
        ("deepseek_v3", LoraSettings(2, 4.0, ("attention", "experts")), 1),
    ],
)
def test_a_folder_proves_itself(case: str, settings: LoraSettings, pad: int, tmp_path: Path) -> None:
    base = write_tiny_model(case, tmp_path / "model")
    model, state = trained(base, tmp_path / "adapter", settings, pad)
    check = compare_adapter(model, state, settings, tmp_path / "adapter", put_base(base, tmp_path / "adapter"))
    assert check.passed, check


def _changed_base(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.01
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _another_scale(base: Path, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 8.001}))


def _a_row_off(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_FILE)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({**tensors, name: tensors[name].roll(1, 0)}, adapter / ADAPTER_FILE)


def _not_a_number(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_FILE)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, adapter / ADAPTER_FILE)


def _a_module_less(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_FILE)
    save_file({name: value for name, value in tensors.items() if "v_proj" not in name}, adapter / ADAPTER_FILE)


def _rows_fewer(base: Path, adapter: Path) -> None:
    tensors, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    rows = config["vocab_size"] - 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows].contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (_changed_base, "layers.1.mlp.down_proj.weight"),
        (_another_scale, "proj.weight"),
        (_a_row_off, "layers.0.attention.q_proj.weight"),
        (_a_module_less, "v_proj.weight"),
        (_not_a_number, "layers.0.attention.q_proj.weight"),
        (_rows_fewer, "embed_tokens.weight"),
    ],
)
def test_what_does_not_belong_together_fails(damage: Callable[[Path, Path], None], where: str, tmp_path: Path) -> None:
    source, settings = write_tiny_model("llama", tmp_path / "model"), LoraSettings(4, 8.0)
    model, state = trained(source, tmp_path / "adapter", settings)
    base = Path(shutil.copytree(source, tmp_path / "other"))
    damage(base, tmp_path / "adapter")
    check = compare_adapter(model, state, settings, tmp_path / "adapter", base)
    assert not check.passed and where in check.reason


def test_a_weight_of_zeros_on_a_base_with_another(tmp_path: Path) -> None:
    source, settings = write_tiny_model("llama", tmp_path / "model"), LoraSettings(4, 8.0)
    model, state = trained(source, tmp_path / "adapter", settings)
    with torch.no_grad():
        model.layers[0].attention.q_proj.bias.zero_()
    check = compare_adapter(model, state, settings, tmp_path / "adapter", source)
    assert not check.passed and "layers.0.attention.q_proj.bias" in check.reason


def test_an_embedding_s_adapter_on_a_base_with_fewer_rows(tmp_path: Path) -> None:
    source, settings = write_tiny_model("llama", tmp_path / "model"), LoraSettings(4, 8.0, ("embedding", "head"))
    model, state = trained(source, tmp_path / "adapter", settings)
    _rows_fewer(source, tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit"):
        compare_adapter(model, state, settings, tmp_path / "adapter", source)


@pytest.mark.parametrize("links", [True, False])
def test_the_base_takes_no_second_room_where_it_can(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(adapter_folder.os, "link", without)
    source = write_tiny_model("llama", tmp_path / "model")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    out = put_base(source, tmp_path / "adapter")
    assert out == tmp_path / "adapter" / BASE
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == files
    for name in files:
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert (out / name).samefile(source / name) is (links and name.suffix == ".safetensors")


@pytest.mark.parametrize(
    ("base", "revision", "enclosed", "parts"),
    [
        ("/store/model", None, True, ['from_pretrained("base")', "No other model", "`/store/model`"]),
        ("/models/qwen", None, False, ['from_pretrained("/models/qwen")']),
        ("owner/name", "abc", False, ['from_pretrained("owner/name", revision="abc")', "revision `abc`"]),
    ],
)
def test_the_readme_tells_what_to_load(
    base: str, revision: str | None, enclosed: bool, parts: list[str], tmp_path: Path
) -> None:
    write_readme(tmp_path, base, revision, enclosed=enclosed, remarks=["vLLM cannot"])
    text = (tmp_path / README_FILE).read_text()
    for part in [*parts, "- vLLM cannot"]:
        assert part in text
    write_readme(tmp_path, base, revision, enclosed=enclosed, remarks=[])
    assert "Remarks" not in (tmp_path / README_FILE).read_text()


def test_the_check_is_one_that_a_receipt_can_hold(tmp_path: Path) -> None:
    source, settings = write_tiny_model("llama", tmp_path / "model"), LoraSettings(2, 4.0)
    model, state = trained(source, tmp_path / "adapter", settings)
    check = compare_adapter(model, state, settings, tmp_path / "adapter", source)
    assert check == Check(check.name, True, 0.0, 2.0**-23, check.reason) and json.dumps(vars(check))
