"""What happens to the last hidden states: an *output* is called as ``output(hidden_TD, head_weight_VD)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

Output = Callable[[Tensor, Tensor], Any]


def full_logits(hidden_TD: Tensor, head_weight_VD: Tensor) -> Tensor:
    """[T, D] x [V, D] -> [T, V]. For comparison and generation: a loss never builds this tensor."""
    return linear(hidden_TD, head_weight_VD)


def hidden_states(hidden_TD: Tensor, head_weight_VD: Tensor) -> Tensor:
    """The normed hidden states themselves, [T, D]."""
    return hidden_TD
