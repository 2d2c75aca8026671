"""A tiny model of every family with all that is peculiar to it switched on, written as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from posttrain_lib.adapters.hf_reference_class import classifier_name
from posttrain_lib.conversion.family_test import TINY_SIZES
from posttrain_lib.conversion.reference_facts import random_reference

_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

#: name of the case -> config.json's fields beside the sizes; "model_type" is the family
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": 9, "head_dim": 16},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_parameters": _YARN},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "phi3": {
        "model_type": "phi3",
        "sliding_window": 9,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "phi3, longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 48,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [1.5, 4.0, 11.0],
        },
    },
    "olmo2": {"model_type": "olmo2", "rms_norm_eps": 1e-6},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {**_YARN, "attention_factor": 1.2079441541679836},
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
        "tie_word_embeddings": True,
    },
    "glm4": {
        "model_type": "glm4",
        "head_dim": 16,
        "attention_bias": True,
        "eos_token_id": [2],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        **_EXPERTS,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9},
    "olmoe": {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.75},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "layer_types": _ALTERNATING,
        "rope_parameters": {**_YARN, "truncate": False},
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "attention_bias": True,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    },
    "deepseek_v3, plain query": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
        "rope_interleave": False,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 20,
        "decoder_sparse_step": 2,
        **_EXPERTS,
    },
}


def tiny_model(case: str, **changes: Any) -> Any:
    """transformers' own model of a case, eager attention, every parameter random: norms, biases, sinks too."""
    return random_reference({**TINY_SIZES, **CASES[case], **changes})


def write_tiny_model(case: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The same as a folder, written by transformers."""
    tiny_model(case, **changes).to(dtype).save_pretrained(folder)
    return folder


#: cases whose architecture transformers has a sequence classification class of
SCORE_CASES = sorted(case for case in CASES if classifier_name(CASES[case]["model_type"]) is not None)


def write_tiny_score_model(case: str, folder: Path, **changes: Any) -> Path:
    """transformers' sequence classification model of a case with one label, as it writes it, every parameter random."""
    architecture = classifier_name(CASES[case]["model_type"])
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return write_tiny_model(case, folder, **{"architectures": [architecture], **labels, **changes})
