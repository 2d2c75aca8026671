"""The checks that both tiers share: bits of the weights, and gradients that do not cross documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain_lib.checkpoint.verify_modules import largest, run_block
from posttrain_lib.models.decoder import Decoder
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.schema.manifests import Check

# A document that leaks into another changes gradients by order 1 of their size; float64 rounding over sums of a
# hundred tokens is 1e-14. Anything between would be a finding.
_GRADIENT_LIMIT = 1e-9


class WeightsCheck:
    """Counts the parameters whose bits differ from the stored ones after the cast back to the file's dtype."""

    def __init__(self) -> None:
        self._compared = 0
        self._wrong: list[str] = []

    def add(self, name: str, parameter: Tensor | None, stored: Tensor) -> None:
        """Compare one parameter, None where ours has none, with the stored tensor."""
        self._compared += 1
        if parameter is None or not same_bits(parameter.detach().to(stored.dtype), stored):
            self._wrong.append(name)

    def check(self) -> Check:
        """The verdict on all that were added."""
        first = f": {self._wrong[0]}" if self._wrong else ""
        return Check(
            "weights round trip",
            not self._wrong,
            f"{len(self._wrong)} of {self._compared} tensors differ{first}",
            "0 tensors",
            "Hugging Face -> ours -> Hugging Face gives the same bits",
        )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality of bits: unlike ==, it tells 0 from -0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.shape == right.shape and torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def check_gradients(spec: ModelSpec, block: Callable[[int], Decoder], lengths: tuple[int, ...]) -> list[Check]:
    """Packed = alone for outputs and all gradients of one block of each kind (window or none), in float64."""
    kinds = {window: layer for layer, window in reversed(list(enumerate(spec.config.windows)))}
    checks = []
    for window, layer in sorted(kinds.items(), key=lambda item: item[1]):
        apart = _block_apart(block(layer).double(), lengths)
        kind = "full attention" if window is None else f"window of {window}"
        checks.append(
            Check(
                f"packed = alone, gradients, layer {layer}",
                apart <= _GRADIENT_LIMIT,
                apart,
                _GRADIENT_LIMIT,
                f"float64, {kind}: outputs, input and parameter gradients, relative to the largest of each",
            )
        )
    return checks


def _block_apart(decoder: Decoder, lengths: tuple[int, ...]) -> float:
    """Largest relative difference between a one-layer decoder run packed and document by document."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), decoder.config.hidden_size)
    hidden, pull = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def run(groups: list[tuple[int, ...]]) -> list[Tensor]:
        decoder.zero_grad(set_to_none=True)
        outputs: list[Tensor] = []
        inputs: list[Tensor] = []
        start = 0
        for group in groups:
            part = slice(start, start + sum(group))
            leaf = hidden[part].clone().requires_grad_()
            result = run_block(decoder, leaf, group)
            (result * pull[part]).sum().backward()
            outputs.append(result.detach())
            inputs.append(_grad(leaf))
            start = part.stop
        grads = [_grad(parameter) for parameter in decoder.layers[0].parameters()]
        return [torch.cat(outputs), torch.cat(inputs), *grads]

    packed, alone = run([lengths]), run([(length,) for length in lengths])
    apart = [largest(left - right) / max(largest(right), 1e-300) for left, right in zip(packed, alone, strict=True)]
    return largest(torch.tensor(apart, dtype=torch.float64))  # unlike max(), it lets no NaN pass


def _grad(leaf: Tensor) -> Tensor:
    """A gradient that was never reached is a zero, which the comparison then sees."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
