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

from posttrain_lib.models.spec import matmul_parameters

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


def batch_flops(spec: ModelSpec, batch: PackedBatch) -> float:
    """Forward and backward FLOPs of one packed batch (numpy), padding left out."""
    config = spec.config
    body, head = matmul_parameters(spec)
    real = batch.document_ids >= 0
    lengths = np.diff(batch.cu_seqlens)[real]
    contexts = None if batch.prefixes is None else np.asarray(batch.prefixes.contexts)[real]
    # QK^T and PV: 2 products x 2 FLOPs x 3 (one forward, two backward) per pair and per head entry.
    per_pair = 12.0 * config.num_attention_heads * config.head_dim
    attention = sum(per_pair * causal_pairs(lengths, window, contexts) for window in config.windows)
    return 6.0 * body * batch.real_tokens + 6.0 * head * len(batch.supervised_index) + attention


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device for this precision; None where none is known (CPUs, fp32)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def relative_pair_cost(spec: ModelSpec) -> float:
    """Cost of one query-key pair of attention over that of one token's matrix products, all layers and the head.

    For dealing rows out to ranks: it leaves out that masked tokens skip the head, and windows.
    """
    config = spec.config
    body, head = matmul_parameters(spec)
    return 12.0 * config.num_attention_heads * config.head_dim * len(config.windows) / (6.0 * (body + head))
