"""Rotary position embedding with Hugging Face's conventions: halves are rotated, angles are float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from posttrain_lib.models.spec import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim/2] on the CPU: radians per position, in transformers' order of operations.

    ``linear`` divides all by ``factor``. ``llama3`` divides wavelengths longer than the original context over
    ``low_freq_factor`` by ``factor``, leaves those shorter than it over ``high_freq_factor``, and blends between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    original = rope.original_max_position_embeddings
    longest, shortest = original / rope.low_freq_factor, original / rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, scaled)


def rope_tables(positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine, sine), float32 [T, 1, H/2] each, of int64 positions [T]. Autocast does not touch them."""
    with torch.autocast(positions_T.device.type, enabled=False):
        angles = positions_T.to(torch.float32)[:, None] * frequencies[None, :]
        return angles.cos()[:, None, :], angles.sin()[:, None, :]


def apply_rope(heads_TNH: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [T, N, H] by tables [T, 1, H/2]; computed in at least float32, returned in the input's dtype."""
    first, second = heads_TNH.chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(heads_TNH.dtype)
