"""Gradients that cannot be compared: of weights that leave nothing to compare with, and of one that ours lacks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain_lib.checkpoint import verify
from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.checkpoint.verify_documents import Documents
from posttrain_lib.checkpoint.verify_gradients import REFERENCE, check_gradients
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.schema.manifests import Check
from tests.support.tiny_models import write_tiny_model


def failed(case: str, factor: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What of the outputs' and gradients' checks fails on a model whose every weight is ``factor`` times as large."""
    path = write_tiny_model(case, folder / "model") / "model.safetensors"
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    save_file({name: value * factor for name, value in load_file(path).items()}, path, metadata=metadata)
    monkeypatch.setattr(verify, "CHECKS", (verify.CHECKS[0], check_gradients))
    return [check for check in verify.verify_model(path.parent).checks if not check.passed]


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_gradients_that_are_all_zero(case: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [check] = failed(case, factor, tmp_path, monkeypatch)
    assert check.name == REFERENCE and "every gradient of the reference is zero" in check.reason


def test_a_reference_that_rounding_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = failed("qwen3", 100.0, tmp_path, monkeypatch)
    assert [check.name for check in found] == [REFERENCE, "gradients"]
    value, limit = found[0].value, found[0].limit
    assert isinstance(value, float) and isinstance(limit, float) and value > limit > 0


def test_ordinary_weights_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed("qwen3", 1.0, tmp_path, monkeypatch) == []


def test_a_parameter_that_ours_lacks_is_caught_where_it_is_zero(tmp_path: Path) -> None:
    folder = write_tiny_model("llama", tmp_path)
    stored = load_file(folder / "model.safetensors")
    ends = tuple(f"{kind}_proj.bias" for kind in "qkv")
    biases = {name: torch.zeros_like(value) for name, value in stored.items() if name.endswith(ends)}
    save_file({**stored, **biases}, folder / "model.safetensors", {"format": "pt"})
    spec = spec_from_folder(folder)
    layers = tuple(replace(own, attention=replace(own.attention, qkv_bias=False)) for own in spec.config.layers)
    spec = replace(spec, config=replace(spec.config, layers=layers), left_alone=r".*[qkv]_proj\.bias$")
    model = build_model(spec)
    load_hf_weights(model, spec, folder)
    report = verify.verify_light(model, spec, folder, Documents.random(spec, (40, 1, 17), 0))
    [check] = [check for check in report.checks if not check.passed]
    assert check.name == "gradients" and "ours has none" in check.reason and report.first_wrong_module in biases
