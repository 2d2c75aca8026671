"""RMS norm with Hugging Face's rounding: statistics in float32, cast back, then the weight."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (hidden / rms(hidden))`` over the last dimension.

    The normalised value is rounded to ``hidden``'s dtype before the weight multiplies it, as transformers'
    LlamaRMSNorm and its Qwen copies do. Half precision is computed in float32; float64 stays float64.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(hidden.dtype)
