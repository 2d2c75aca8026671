"""Heads with everything on, small enough for float64 and dense references."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain_lib.ops.output_head import HeadAdapter, OutputHead

HIDDEN, VOCAB, TOKENS, RANK = 12, 37, 25, 3
#: entries that exist where a case has padding
REAL = VOCAB - 4


@dataclass(frozen=True)
class Options:
    """What a head has besides its weight."""

    padded: bool = False
    scale: float = 1.0
    softcap: float | None = None
    adapter: bool = False


EVERYTHING = Options(padded=True, scale=0.6, softcap=2.5, adapter=True)

any_options = st.builds(
    Options,
    padded=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 1.7]),
    softcap=st.sampled_from([None, 3.0]),
    adapter=st.booleans(),
)


@dataclass
class Case:
    """A head, hidden states that go into it, and which positions count."""

    hidden: Tensor
    head: OutputHead
    targets: Tensor
    loss_weights: Tensor
    index: Tensor

    def inputs(self) -> list[Tensor]:
        """What a gradient is taken in."""
        found = [self.hidden, self.head.weight_VD]
        if self.head.adapter is not None:
            found += [self.head.adapter.down_RD, self.head.adapter.up_VR]
        return found

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, new leaves of a graph."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        adapter = self.head.adapter
        if adapter is not None:
            adapter = HeadAdapter(leaf(adapter.down_RD), leaf(adapter.up_VR), adapter.scale)
        head = replace(self.head, weight_VD=leaf(self.head.weight_VD), adapter=adapter)
        return Case(leaf(self.hidden), head, self.targets, self.loss_weights.to(dtype), self.index)


def make_case(count: int, options: Options = Options(), *, size: int = HIDDEN, seed: int = 0) -> Case:
    """A case in float64 of ``count`` positions among TOKENS."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight = normal(TOKENS, size), normal(VOCAB, size)
    adapter = HeadAdapter(normal(RANK, size), normal(VOCAB, RANK), 0.5) if options.adapter else None
    head = OutputHead(weight, REAL if options.padded else None, options.scale, options.softcap, adapter)
    index = torch.randperm(TOKENS, generator=generator)[:count].sort().values
    loss_weights = torch.zeros(TOKENS, dtype=torch.float64)
    loss_weights[index] = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    return Case(hidden, head, torch.randint(REAL, (TOKENS,), generator=generator), loss_weights, index)


def value_and_gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Sum, values per position and gradients, under a factor outside of the operation."""
    return [*results, *torch.autograd.grad(results[0] * 0.3, inputs)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], atol: float) -> None:
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=0, atol=atol)


def assert_near_in(dtype: torch.dtype, found: list[Tensor], expected: list[Tensor]) -> None:
    """Within 12 units of rounding of the greatest number in each tensor: logits of these cases reach about 12, so they
    are off by about as many units and probabilities by that part of themselves; the products average their terms'."""
    for got, wanted in zip(found, expected, strict=True):
        if wanted.numel():
            bound = 12 * torch.finfo(dtype).eps * float(wanted.detach().abs().max())
            torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=0, atol=bound)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and the shapes of what matrix products do."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self.largest = max(self.largest, item.numel())
        if "mm" in func.name():
            self.products.append(tuple(result.shape))
        return result
