"""A packed row for a decoder, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_lib.models.heads import hidden_states

#: many lengths of one sum: documents of a token, one long one, windows crossed and not
ROWS = (
    (5, 1, 17, 9),
    (32,),
    (1, 31),
    (16, 16),
    (8, 8, 8, 8),
    (30, 1, 1),
    (2, 3, 27),
    (4,) * 8,
    (20, 12),
    (11, 10, 11),
)


def row_of(lengths: Sequence[int], vocabulary: int = 96, seed: int = 0) -> tuple[Any, ...]:
    """The decoder's arguments for random documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(vocabulary, (sum(lengths),), generator=generator),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max(lengths),
    )


def run_row(model: nn.Module, lengths: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """(last hidden states, gradient of every trained parameter that takes part) of one row."""
    hidden = model(*row_of(lengths), hidden_states)
    generator = torch.Generator().manual_seed(1)
    (hidden * torch.randn(hidden.shape, generator=generator).to(hidden.dtype)).sum().backward()
    return hidden.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that there are, by name, sharded ones put together."""
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}
