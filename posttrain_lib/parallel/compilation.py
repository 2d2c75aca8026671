"""Blocks compiled by ``torch.compile``: one piece of code for all layers that are alike, and for all rows.

What depends on where a row's documents lie stays outside (``torch.compiler.disable`` stands at attention, experts and
linear attention), so that the compiled pieces see tensors of one shape, step after step: a block becomes what lies
before and behind those. Layers share them, because a layer's weights are inputs of the code and its number is not read.

Sums are ordered anew and rounded less often, so that loss and gradients differ from uncompiled ones by rounding.
Without gradients the block runs as it is: evaluation and generation have other lengths, and each would be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from posttrain_lib.errors import ConfigError

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder

#: none, or every decoder block by itself
Compilation = Literal["none", "blocks"]


def compile_blocks(model: Decoder, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every block of a model, in place, when it first runs. No module appears: weights keep their names.

    Before sharding and recomputation, which then stand around the compiled code. ``backend``: another compiler of
    torch's, for tests.

    Raises:
        ConfigError: blocks that are not of our own definition.
    """
    from posttrain_lib.models.blocks import DecoderBlock

    foreign = [type(layer).__name__ for layer in model.layers if not isinstance(layer, DecoderBlock)]
    if foreign:
        raise ConfigError(
            "only blocks of our own definition are compiled",
            where="train.compile",
            got=foreign[0],
            fix="set train.compile: none where model.backend is hf",
        )
    # One callable for all layers: theirs would each be compiled by itself.
    compiled: Callable[..., Any] = torch.compile(DecoderBlock.forward, dynamic=False, backend=backend)
    for layer in model.layers:
        layer.forward = partial(_forward, partial(compiled, layer), layer.forward)


def _forward(compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*args)


def check_compiler(device: torch.device) -> None:
    """Compile and run one line on the device, so that what is missing shows before a run and not in its first step.

    It takes seconds: torch's compiler is loaded, and where its own cache has nothing, a C++ compiler runs.

    Raises:
        ConfigError: with the compiler's own words.
    """
    values = torch.ones(8, device=device)
    try:
        found = torch.compile(_one_line, fullgraph=True)(values)
    except Exception as error:  # torch has no common class for what compilers, linkers and their absence throw
        raise ConfigError(
            "this machine cannot compile the model's blocks",
            where="train.compile",
            got=_reason(error),
            expected="a C++ compiler with Python's headers on a CPU; Triton and a C compiler on a GPU",
            fix="install it where the workers run (CXX names another), or set train.compile: none",
        ) from error
    torch.testing.assert_close(found, _one_line(values))


def _one_line(values: torch.Tensor) -> torch.Tensor:
    return torch.sin(values) + 1


def _reason(error: BaseException) -> str:
    """The innermost error's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
