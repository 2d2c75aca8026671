"""Tiny models of every family, as Hugging Face folders with weights that leave nothing hidden."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> (family, fields): the shapes of the families' published models, small.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-3.2": ("llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-biased": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16, "rms_norm_eps": 1e-6}),
    "qwen3-untied": ("qwen3", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
}


def write_tiny(name: str, folder: Path, **changes: Any) -> Path:
    """Write a tiny model folder: weights large enough that every part of the decoder shows in the logits."""
    import torch
    from safetensors.torch import save_file

    from posttrain_lib.adapters.hf_reference import architecture_config
    from posttrain_lib.checkpoint.hf import stored_tensors
    from posttrain_lib.models.families import get_family, spec_from_config

    family, fields = TINY[name]
    content = architecture_config(family, {**_BASE, **fields, **changes})
    content.update(architectures=[get_family(family).architecture], dtype="float32")
    spec = spec_from_config(content)
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for ours, shape in spec.parameter_shapes().items():
        values = torch.randn(shape, generator=generator)
        weights[ours] = 1 + 0.3 * values if ours.endswith("norm.weight") else 0.2 * values
    weights = stored_tensors(spec, weights, torch.float32)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    (folder / "tokenizer_config.json").write_text('{"note": "bytes that an export must keep"}')
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name in TINY -> its folder, written once per session. Do not change it: copy it first."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else write_tiny(name, path)

    return folder


@pytest.fixture(params=sorted(TINY))
def tiny(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> Path:
    """Every tiny model in turn."""
    return tiny_folder(request.param)
