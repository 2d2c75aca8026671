"""What tests of adapters share: one document, adapters with values, and everything that a model can have adapted."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.lora import GROUPS, LoraDecoder, LoraSettings, known_targets

LENGTH = 20
TOKENS = torch.arange(LENGTH) * 7 % 90 + 3


def logits_of(model: Decoder) -> Tensor:
    """[T, V] of the one document."""
    cu_seqlens = torch.tensor([0, LENGTH], dtype=torch.int32)
    return model(TOKENS, torch.arange(LENGTH), cu_seqlens, LENGTH)


def everything_of(model: Decoder, *, dora: bool = False) -> LoraSettings:
    """Adapters of rank 4 and scale 2 on every group that the model has, or on those that DoRA is for."""
    wanted = ("attention", "mlp") if dora else tuple(GROUPS)
    return LoraSettings(4, 8.0, tuple(target for target in known_targets(model) if target in wanted), dora=dora)


def scramble(model: LoraDecoder, seed: int = 0, size: float = 0.2) -> None:
    """Give the adapters values of order ``size`` (float32 numbers), magnitudes a tenth of change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_magnitude"):
                value.copy_((value * (1 + 0.1 * torch.randn(value.shape, generator=generator))).float())
            elif "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * size)
