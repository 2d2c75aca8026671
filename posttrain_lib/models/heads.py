"""What happens to the last hidden states: an *output* is called as ``output(hidden_TD, head)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from posttrain_lib.ops.output_head import OutputHead

Output = Callable[[Tensor, OutputHead], Any]


def full_logits(hidden_TD: Tensor, head: OutputHead) -> Tensor:
    """[T, D] -> [T, V]. For comparison and generation: a loss never builds this tensor."""
    return head.logits(hidden_TD)


def hidden_states(hidden_TD: Tensor, head: OutputHead) -> Tensor:
    """The normed hidden states themselves, [T, D]."""
    return hidden_TD
