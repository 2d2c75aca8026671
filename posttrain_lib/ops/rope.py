"""Rotary position embedding with Hugging Face's conventions: halves are turned (or neighbours), angles are float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain_lib.ops.fused import fuses

if TYPE_CHECKING:
    from posttrain_lib.models.spec import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """float32 [dims/2] on the CPU: radians per position, in transformers' order of operations; [2, dims/2] for
    ``longrope``: those of short documents and those of long ones (:func:`by_document`).

    ``linear`` divides all by ``factor``. ``llama3`` divides wavelengths longer than the original context over
    ``low_freq_factor`` by ``factor``, leaves those shorter than it over ``high_freq_factor``, and blends between.
    ``yarn`` (Peng et al. 2023) leaves frequencies that turn more than ``beta_fast`` times within the original context,
    divides those that turn less than ``beta_slow`` times, and blends between. ``longrope`` (Ding et al. 2024) divides
    each by a number of its own that was searched for.
    """
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.int64).to(torch.float32) / rope.dims
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, exponents)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor([rope.short_factor, rope.long_factor], dtype=torch.float32) * rope.theta**exponents)
    return frequencies


def by_document(frequencies: Tensor, bound: int, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """float32 [T, dims/2]: each token's frequencies of longrope's two sets [2, dims/2], by its document's length.

    The length is the last position + 1, as transformers counts it, so that it also holds of new tokens behind a cache.
    Above ``bound`` (``original_max_position_embeddings``) *every* token of the document has the second set: that is how
    Microsoft's and transformers' code run a sequence by itself. vLLM chooses once for all requests, by whether its
    ``max_model_len`` is above ``bound``; what is trained on short documents is served as trained at or below it.
    """
    ends = positions_T[cu_seqlens[1:].long() - 1] + 1
    number = (ends > bound).long().repeat_interleave(cu_seqlens.diff(), output_size=len(positions_T))
    return frequencies[number]


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
    """(cosine, sine), float32 [T, 1, dims/2] each, of int64 positions [T] and frequencies [dims/2], or [T, dims/2]
    where tokens differ. Autocast does not touch them."""
    with torch.autocast(positions_T.device.type, enabled=False):
        angles = positions_T.to(torch.float32)[:, None] * frequencies
        cosine, sine = angles.cos()[:, None, :], angles.sin()[:, None, :]
        return (cosine, sine) if factor == 1.0 else (cosine * factor, sine * factor)


def apply_rope(heads_TNH: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the first ``2 * cosine.shape[-1]`` entries of [T, N, H]; computed in float32 at least, same dtype back.

    On a GPU a kernel does it in one pass; the tables, which depend on no weight, get no gradient there.
    """
    if fuses(heads_TNH, cosine, sine) and cosine.dtype == sine.dtype == torch.float32:
        from posttrain_lib.ops.rope_triton import apply_rope_kernel

        return apply_rope_kernel(heads_TNH, cosine, sine, interleaved=interleaved)
    turning, dims = heads_TNH, 2 * cosine.shape[-1]
    if dims < heads_TNH.shape[-1]:
        turning = heads_TNH[..., :dims]
    first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    pair = first * cosine - second * sine, second * cosine + first * sine
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    turned = turned.to(heads_TNH.dtype)
    return turned if dims == heads_TNH.shape[-1] else torch.cat((turned, heads_TNH[..., dims:]), dim=-1)
