"""Rotary position embedding with Hugging Face's conventions: halves are turned (or neighbours), angles are float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from posttrain_lib.models.spec import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """float32 [dims/2] on the CPU: radians per position, in transformers' order of operations.

    ``linear`` divides all by ``factor``. ``llama3`` divides wavelengths longer than the original context over
    ``low_freq_factor`` by ``factor``, leaves those shorter than it over ``high_freq_factor``, and blends between.
    ``yarn`` (Peng et al. 2023) leaves frequencies that turn more than ``beta_fast`` times within the original context,
    divides those that turn less than ``beta_slow`` times, and blends between.
    """
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.int64).to(torch.float32) / rope.dims
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, exponents)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    original = rope.original_max_position_embeddings
    longest, shortest = original / rope.low_freq_factor, original / rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeConfig, exponents: Tensor) -> Tensor:
    def dimension(rotations: float) -> float:
        """The pair of entries that turns so many times within the original context."""
        span = math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
        return rope.dims * span / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    periods = rope.theta**exponents
    kept, divided = 1.0 / periods, 1.0 / (rope.factor * periods)
    ramp = ((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    share = 1 - ramp
    return divided * (1 - share) + kept * share


def rope_tables(positions_T: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cosine, sine), float32 [T, 1, dims/2] each, of int64 positions [T]. Autocast does not touch them."""
    with torch.autocast(positions_T.device.type, enabled=False):
        angles = positions_T.to(torch.float32)[:, None] * frequencies[None, :]
        cosine, sine = angles.cos()[:, None, :], angles.sin()[:, None, :]
        return (cosine, sine) if factor == 1.0 else (cosine * factor, sine * factor)


def apply_rope(heads_TNH: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first ``2 * cosine.shape[-1]`` entries of [T, N, H]; computed in float32 at least, same dtype back."""
    turning, dims = heads_TNH, 2 * cosine.shape[-1]
    if dims < heads_TNH.shape[-1]:
        turning = heads_TNH[..., :dims]
    first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    pair = first * cosine - second * sine, second * cosine + first * sine
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    turned = turned.to(heads_TNH.dtype)
    return turned if dims == heads_TNH.shape[-1] else torch.cat((turned, heads_TNH[..., dims:]), dim=-1)
