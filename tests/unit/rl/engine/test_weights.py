"""Weights under Hugging Face names without a folder: what a saved folder holds, there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain_lib.errors import RolloutError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.lora import LoraSettings, apply_lora, init_adapters, merged_state_dict
from posttrain_lib.rl.engine.weights import hf_weights, take_weights
from tests.oracles.tiny_job import write_model
from tests.support.engines import loaded
from tests.support.tiny_models import CASES


@pytest.mark.parametrize("case", sorted(CASES))
def test_they_are_the_folders_in_every_family(case: str, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder(case)
    model, spec = loaded(folder, torch.float32, pad_to=50)
    found = dict(hf_weights(model, spec))
    stored = load_file(folder / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name].float()) for name in stored)
    other = build_model(spec)
    take_weights(other, spec, stored.items())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_weights_that_lie_alike_are_not_copied(tmp_path: Path) -> None:
    model, spec = loaded(write_model(tmp_path / "model"))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert all(value.untyped_storage().data_ptr() in own for _, value in hf_weights(model, spec))


def test_adapters_are_merged(tmp_path: Path) -> None:
    base, spec = loaded(write_model(tmp_path / "model"))
    model = apply_lora(base, LoraSettings(rank=2, alpha=4.0))
    init_adapters(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_up" in name:
                parameter.fill_(0.1)
    other = build_model(spec, dtype=torch.float64)
    take_weights(other, spec, hf_weights(model, spec))
    merged = merged_state_dict(model)
    assert all(torch.equal(value, merged[name]) for name, value in other.named_parameters())
    query = "layers.0.attention.q_proj.weight"
    assert not torch.equal(merged[query], dict(model.named_parameters())[query])


def test_what_is_not_the_models_is_refused_by_name(tmp_path: Path) -> None:
    model, spec = loaded(write_model(tmp_path / "model"))
    weights = dict(hf_weights(model, spec))
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    wrong = {
        "no such weight.*\n.*lm_head.weight": [*weights.items(), ("lm_head.weight", weights[embedding])],
        f"a weight twice\n.*{norm}": [*weights.items(), (norm, weights[norm])],
        f"another shape.*\n.*{norm}": [(norm, torch.ones(17))],
        f"another shape.*\n.*{embedding}": [(embedding, torch.ones(128, 16))],
        f"not given all.*\n.*{norm}": [pair for pair in weights.items() if pair[0] != norm],
    }
    for message, pairs in wrong.items():
        with pytest.raises(RolloutError, match=message):
            take_weights(model, spec, pairs)
