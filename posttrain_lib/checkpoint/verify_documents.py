"""What the gate measures with: random documents, and limits that are multiples of measured rounding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.spec import ModelSpec

# Two valid float32 orders of summation differ from the exact result by errors of one size but not of one value; the
# largest of some 10^5 such errors varies between runs by less than a factor of 2, a fused attention kernel
# (ours) and separate products (the reference's) by another. 8 leaves room for both. The faults that the gate is for
# (a wrong constant, tensor or order) are above it by a factor of 100 and more; tests measure that.
NOISE_FACTOR = 8.0
# Where the reference's float32 happens to be exact (an embedding lookup), one rounding is still allowed.
_ROUNDING = 2.0**-23


def largest(values: Tensor) -> float:
    """Largest magnitude; NaN where there is one."""
    return float(values.abs().max()) if values.numel() else 0.0


def furthest(apart: Mapping[str, float]) -> tuple[str, float]:
    """(name, value) of the largest difference. A NaN is larger than all: in a comparison of numbers it would be lost
    to whatever comes behind it."""
    name = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
    return name, apart[name]


def noise_limit(floor: float, exact: Tensor) -> float:
    """The largest difference that rounding explains, given the reference's own."""
    return NOISE_FACTOR * floor + _ROUNDING * largest(exact)


def places(lengths: tuple[int, ...], stride: int = 1) -> tuple[Tensor, Tensor]:
    """(positions int64 [T], from 0 in each document, ``stride`` apart; cu_seqlens int32 [n+1])."""
    positions = torch.cat([torch.arange(length) * stride for length in lengths])
    ends = [0, *itertools.accumulate(lengths)]
    return positions, torch.tensor(ends, dtype=torch.int32)


@dataclass(frozen=True)
class Documents:
    """Random documents, laid end to end. ``token_ids`` int64 [T]."""

    token_ids: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def random(cls, spec: ModelSpec, lengths: tuple[int, ...], seed: int) -> Documents:
        """Uniform token ids, lengths cut to what the model's positions allow.

        The padding token is never drawn: transformers gives its embedding no gradient.
        """
        fitting = tuple(min(length, spec.config.max_position_embeddings) for length in lengths)
        generator = torch.Generator().manual_seed(seed)
        padding, entries = spec.hf_config.get("pad_token_id"), spec.config.vocab_size
        if not isinstance(padding, int) or not 0 <= padding < entries or entries == 1:
            return cls(torch.randint(entries, (sum(fitting),), generator=generator), fitting)
        ids = torch.randint(entries - 1, (sum(fitting),), generator=generator)
        return cls(ids + (ids >= padding), fitting)

    @property
    def positions(self) -> Tensor:
        """int64 [T], from 0 in each document."""
        return places(self.lengths)[0]

    def packed_logits(self, model: Decoder) -> Tensor:
        """[T, V] of ours, all documents in one row."""
        positions, cu_seqlens = places(self.lengths)
        with torch.no_grad():
            return model(self.token_ids, positions, cu_seqlens, max(self.lengths))

    def reference_logits(self, reference: nn.Module) -> Tensor:
        """[T, V] of transformers', each document by itself."""
        from posttrain_lib.adapters.hf_reference import reference_logits

        return torch.cat([reference_logits(reference, part) for part in self.token_ids.split(self.lengths)])
