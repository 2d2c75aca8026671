"""The gated activations of the feed-forward block; on a GPU a kernel does each in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor
from torch.nn.functional import gelu, silu

from posttrain_lib.ops.experts import clamped_swiglu
from posttrain_lib.ops.fused import fuses


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise, any shape."""
    fused = _fused(gate, up, "silu")
    return silu(gate) * up if fused is None else fused


def gelu_tanh_glu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with gelu's tanh approximation (Gemma)."""
    fused = _fused(gate, up, "gelu_tanh")
    return gelu(gate, approximate="tanh") * up if fused is None else fused


def gelu_glu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the exact gelu."""
    fused = _fused(gate, up, "gelu")
    return gelu(gate) * up if fused is None else fused


def _fused(gate: Tensor, up: Tensor, activation: Literal["silu", "gelu_tanh", "gelu"]) -> Tensor | None:
    """The kernel's product; None where the kernel does not take these."""
    if not fuses(gate, up) or gate.dtype != up.dtype or gate.shape != up.shape:
        return None
    from posttrain_lib.ops.swiglu_triton import gated

    return gated(gate, up, activation)


#: name in ``models.spec.Activation`` -> (gate, up) -> product
GATED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": swiglu,
    "gelu_tanh": gelu_tanh_glu,
    "gelu": gelu_glu,
    "clamped_swiglu": clamped_swiglu,
}
