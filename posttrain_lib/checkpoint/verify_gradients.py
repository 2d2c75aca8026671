"""Gradients: of every parameter against transformers', and of packed documents against each by itself."""

from __future__ import annotations

import copy
import statistics

import torch
from torch import Tensor, nn

from posttrain_lib.checkpoint.verify_comparison import Comparison
from posttrain_lib.checkpoint.verify_documents import largest, noise_limit, places
from posttrain_lib.checkpoint.verify_report import Finding
from posttrain_lib.checkpoint.verify_subject import run_layer
from posttrain_lib.models.attention import RopeTables

# A document that leaks into another changes gradients by order 1 of their size; float64 rounding over sums of a
# hundred tokens is 1e-14. Anything between would be a finding.
_LEAK_LIMIT = 1e-9
# A gradient that is zero but for rounding (of a key's bias without positions: the softmax does not see it) is measured
# against the others instead of against itself.
_NEGLIGIBLE = 1e-6
#: the check that only fails, where the weights leave nothing to compare with
REFERENCE = "the reference's own gradients"
# Half of float32's 24 bits. Ordinary weights leave gradients a relative error of 4e-7 to 2e-6 (all families of the
# tests), so that whatever is above it comes from the weights and not from the size or depth of a model.
_LOST = 2.0**-12


def check_gradients(it: Comparison) -> list[Finding]:
    """The gradient of every trained parameter, under a random pull on the outputs.

    A parameter's limit is the reference's own float32 distance from its float64 on it. Where that is small by chance
    (a gate of four numbers), the median over all parameters, in proportion to the gradient's size, stands in.
    """
    swapped = it.ours.routing.swapped if it.ours.routing.count else None
    pull = torch.randn(it.ours.output.shape, generator=torch.Generator().manual_seed(it.seed), dtype=torch.float64)
    if swapped is not None:
        # Told weights are constants and train no router: documents where experts swapped have no say.
        tokens = swapped(len(pull)) | it.fine.routing.swapped(len(pull))
        for rows, mask in zip(pull.split(it.subject.lengths), tokens.split(it.subject.lengths), strict=True):
            rows *= float(not mask.any())
    coarse, _ = it.reference_gradients(it.coarse_reference, pull)
    fine, unknown = it.reference_gradients(it.fine_reference, pull)
    if not any(largest(value) for value in fine.values()):
        if pull.any():
            reason = (
                "every gradient of the reference is zero: the weights are, or their size overflows a norm's float32"
            )
            return [Finding(REFERENCE, float("inf"), 0.0, reason)]
        reason = "experts swap under rounding in every document: no gradient can be compared"
        return [Finding("gradients", float("inf"), 0.0, reason)]
    ours = it.our_gradients(pull)
    floors = {name: largest(coarse[name] - exact) for name, exact in fine.items()}
    usual = statistics.median(floors[name] / size for name, exact in fine.items() if (size := largest(exact)))
    found = []
    for name, exact in fine.items():
        floor = max(floors[name], usual * largest(exact))
        reason = f"float32 against transformers' float64, from which its own float32 is {floors[name]:.2e} away"
        own, where = ours.get(name), it.subject.named(name)
        if own is None:
            found.append(Finding("gradients", float("inf"), 0.0, "is trained and gets no gradient", where))
            continue
        found.append(Finding("gradients", _apart(own, exact), noise_limit(floor, exact), reason, where))
    for name in sorted(set(ours) - set(fine)):
        where = it.subject.named(name)
        found.append(Finding("gradients", float("inf"), 0.0, "transformers trains no such parameter", where))
    for tensor in unknown:  # where it is zero, as a bias may be, no output tells
        found.append(Finding("gradients", float("inf"), 0.0, "transformers trains it, and ours has none", tensor))
    failed = {finding.module for finding in found if not finding.passed}
    lost = [
        floors[name] / largest(exact) if largest(exact) else 0.0
        for name, exact in fine.items()
        if it.subject.named(name) in failed
    ]
    return [*_lost_digits(lost), *found]


def _lost_digits(lost: list[float]) -> list[Finding]:
    """That the reference cannot be compared with, if rounding decides the gradients on which the two disagree.

    ``lost``: of each such parameter, the reference's float32 relative to its float64.
    """
    usual = statistics.median(lost) if lost else 0.0
    if usual <= _LOST:
        return []
    reason = "its float32 is this far from its float64, relative to the gradient, where it disagrees with ours (median)"
    return [Finding(REFERENCE, usual, _LOST, reason)]


def _apart(own: Tensor, exact: Tensor) -> float:
    return largest(own - exact) if own.shape == exact.shape else float("inf")


def check_packed_gradients(it: Comparison) -> list[Finding]:
    """Outputs and gradients of one block of each kind in float64, packed and document by document."""
    found = []
    for layer in it.subject.kinds:
        model, name = it.subject.model, it.subject.named(f"layers.{layer}")
        tables = model.rope_tables(*places(it.subject.lengths))
        block = copy.deepcopy(model.layers[layer]).double()
        apart = _block_apart(block, tables, it.subject.lengths, model.config.hidden_size)
        reason = "float64: outputs, input and parameter gradients, relative to the largest of each"
        found.append(Finding("packed = alone, gradients", apart, _LEAK_LIMIT, reason, name))
    return found


def _block_apart(block: nn.Module, tables: RopeTables, lengths: tuple[int, ...], size: int) -> float:
    """Largest relative difference between a block that is run packed and document by document."""
    generator = torch.Generator().manual_seed(0)
    hidden, pull = (torch.randn(sum(lengths), size, generator=generator, dtype=torch.float64) for _ in range(2))

    def run(groups: list[tuple[int, ...]]) -> list[Tensor]:
        block.zero_grad(set_to_none=True)
        outputs: list[Tensor] = []
        inputs: list[Tensor] = []
        start = 0
        for group in groups:
            part = slice(start, start + sum(group))
            leaf = hidden[part].clone().requires_grad_()
            turned = tuple((cosine[part], sine[part]) for cosine, sine in tables)
            result = run_layer(block, turned, leaf, group)
            (result * pull[part]).sum().backward()
            outputs.append(result.detach())
            inputs.append(_grad(leaf))
            start = part.stop
        grads = [_grad(parameter) for parameter in block.parameters() if parameter.requires_grad]
        return [torch.cat(outputs), torch.cat(inputs), *grads]

    packed, alone = run([lengths]), run([(length,) for length in lengths])
    least = _NEGLIGIBLE * max(largest(value) for value in alone)
    apart = [largest(left - right) / max(largest(right), least) for left, right in zip(packed, alone, strict=True)]
    return largest(torch.tensor(apart, dtype=torch.float64))  # unlike max(), it lets no NaN pass


def _grad(leaf: Tensor) -> Tensor:
    """A gradient that was never reached is a zero, which the comparison then sees."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
