"""Floating-point operations that the model needs for the useful tokens, and peaks to hold them against.

Counted as PaLM (Chowdhery et al. 2022, appendix B) does, made exact for packed rows: 6 per token and matrix
parameter of the body, 6 per *supervised* token and head parameter (the head skips the others), and for attention
6 * layers * heads * head_dim * (sum of squared document lengths), which is causal and within documents. Embedding
lookups, norms, recomputation and padding are not counted.

Where documents share their beginning, its tokens lie in the batch once and count once, as every other useful token:
what sharing saves is not in the count. A segment of m tokens after d shared ones has m * d + m^2 / 2 pairs in place of
m^2 / 2, so a whole tree has those of its documents less those of each beginning computed before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from posttrain_lib.models.hf_spec import HFSpec
from posttrain_lib.models.spec import GatedDeltaConfig, LatentAttentionConfig, Mixer, matmul_parameters

if TYPE_CHECKING:
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.schema.batches import PackedBatch

#: dense bf16 FLOP/s from the maker's data sheets, without sparsity; the first name that the device's contains counts
PEAK_BF16_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


def causal_pairs(lengths: np.ndarray, window: int | None, contexts: np.ndarray | None = None) -> float:
    """Query-key pairs of causal attention over segments of these lengths, a query seeing at most ``window`` keys.

    Half of the full square, as is the custom; the diagonal's other half is not counted. ``contexts``: tokens of the
    document before each segment, keys but not queries; None = none before any.
    """
    if contexts is not None:
        return causal_pairs(contexts + lengths, window) - causal_pairs(contexts, window)
    lengths = lengths.astype(np.float64)
    if window is None:
        return float((lengths**2 / 2).sum())
    short = np.minimum(lengths, window)
    return float((short**2 / 2 + (lengths - short) * window).sum())


def batch_flops(spec: ModelSpec | HFSpec, batch: PackedBatch, *, adapter_parameters: int | None = None) -> float:
    """Forward and backward FLOPs of one packed batch (numpy), padding left out.

    ``adapter_parameters``: those of low-rank adapters where they alone are trained; the frozen weights then have no
    gradient of their own, 4 FLOPs a parameter in place of 6.
    """
    real = batch.document_ids >= 0
    lengths = np.diff(batch.cu_seqlens)[real]
    contexts = None if batch.prefixes is None else np.asarray(batch.prefixes.contexts)[real]
    if isinstance(spec, HFSpec):
        products = spec.body_parameters * batch.real_tokens + spec.head_parameters * len(batch.supervised_index)
        return 6.0 * products + spec.flops_per_pair * causal_pairs(lengths, None, contexts)
    config = spec.config
    body, head = matmul_parameters(spec)
    pairs = {
        window: causal_pairs(lengths, window, contexts)
        for window in {layer.attention.window for layer in config.layers}
    }
    mixing = sum(
        flops_per_pair(layer.attention) * pairs[layer.attention.window]
        + flops_per_token(layer.attention) * batch.real_tokens
        for layer in config.layers
    )
    each = 6.0 if adapter_parameters is None else 4.0
    adapters = 6.0 * (adapter_parameters or 0) * batch.real_tokens
    return each * body * batch.real_tokens + each * head * len(batch.supervised_index) + adapters + mixing


def flops_per_pair(mixer: Mixer) -> float:
    """Of one query-key pair, forward and backward: 2 products (scores, values) x 2 FLOPs x 3 (one forward, two
    backward) per head and entry. Linear attention has no pairs."""
    if isinstance(mixer, GatedDeltaConfig):
        return 0.0
    if isinstance(mixer, LatentAttentionConfig):
        return 6.0 * mixer.num_attention_heads * (mixer.nope_dim + mixer.rope.dims + mixer.value_dim)
    return 12.0 * mixer.num_attention_heads * mixer.head_dim


def flops_per_token(mixer: Mixer) -> float:
    """Of one token besides the projections, forward and backward. The delta rule reads its memory twice and writes it
    once, 2 FLOPs an entry each (its recurrence; that chunks compute more to run faster is not counted); each tap of the
    convolution in front is 2."""
    if not isinstance(mixer, GatedDeltaConfig):
        return 0.0
    memory = mixer.num_value_heads * mixer.key_dim * mixer.value_dim
    channels = 2 * mixer.num_key_heads * mixer.key_dim + mixer.num_value_heads * mixer.value_dim
    return 3.0 * (6.0 * memory + 2.0 * mixer.kernel * channels)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device for this precision; None where none is known (CPUs, fp32)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def relative_pair_cost(spec: ModelSpec | HFSpec) -> float:
    """Cost of one query-key pair of attention over that of one token's matrix products, all layers and the head.

    For dealing rows out to ranks: it leaves out that masked tokens skip the head, and windows.
    """
    if isinstance(spec, HFSpec):
        return spec.flops_per_pair / (6.0 * (spec.body_parameters + spec.head_parameters))
    body, head = matmul_parameters(spec)
    return sum(flops_per_pair(layer.attention) for layer in spec.config.layers) / (6.0 * (body + head))
