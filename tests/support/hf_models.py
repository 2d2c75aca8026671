"""Tiny models of architectures that have no definition here, written by transformers, all parameters random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: model_type -> config.json's fields beside the sizes; beside each what is peculiar
HF_CASES: dict[str, dict[str, Any]] = {
    "stablelm": {},  # layer norm with bias
    "gpt_neox": {},  # attention and feed-forward side by side
    "gpt2": {"n_inner": 48},  # learned positions, tied, transposed weights, dropout of 0.1
    "cohere": {"logit_scale": 0.3},  # a scale on the logits, tied
    "nanochat": {},  # a soft cap, which its code alone states
    "phi": {},  # an output projection with a bias
    "mamba": {"state_size": 8},  # recurrent: no attention, no positions
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},  # experts
}


def write_hf_model(model_type: str, folder: Path, **changes: Any) -> Path:
    """A folder of a case, or of any other ``model_type``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **HF_CASES.get(model_type, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            # Small products, norms about their neutral value: activations stay of order 1 through all layers.
            scale = 0.15 if tensor.dim() > 1 else 0.3
            tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    return folder
