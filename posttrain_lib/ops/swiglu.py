"""The gated activations of the feed-forward block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn.functional import gelu, silu

from posttrain_lib.ops.experts import clamped_swiglu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise, any shape."""
    return silu(gate) * up


def gelu_tanh_glu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with gelu's tanh approximation (Gemma)."""
    return gelu(gate, approximate="tanh") * up


def gelu_glu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the exact gelu."""
    return gelu(gate) * up


#: name in ``models.spec.Activation`` -> (gate, up) -> product
GATED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": swiglu,
    "gelu_tanh": gelu_tanh_glu,
    "gelu": gelu_glu,
    "clamped_swiglu": clamped_swiglu,
}
