"""Parameters against the files: the bits that were loaded, and in words what is wrong with them."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_lib.checkpoint.verify_subject import Subject


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality of bits: unlike ==, it tells 0 from -0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.shape == right.shape and torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def parameter_fault(module: str, subject: Subject) -> str | None:
    """What is wrong with the parameters of a module itself, by its name in the subject; None where they agree."""
    ours = {name: value.detach() for name, value in subject.model.named_parameters()}
    should = subject.spec.parameter_shapes()
    names = [name for name in {**should, **ours} if name.rpartition(".")[0] == module]
    for name in names:
        fault = _fault(ours.get(name), subject.stored(name) if name in should else None)
        if fault is not None:
            return f"parameter {subject.named(name)} {fault}"
    return None


def _fault(own: Tensor | None, stored: Tensor | None) -> str | None:
    if own is None or stored is None:
        return None if own is stored else f"exists only in {'transformers' if own is None else 'ours'}"
    if own.shape != stored.shape:
        return f"has shape {list(own.shape)}, the stored one {list(stored.shape)}"
    own = own.to(stored.dtype)
    if torch.equal(own, stored):
        return None
    if own.dim() >= 2 and own.shape[-1] == own.shape[-2] and torch.equal(own.transpose(-1, -2), stored):
        return "is transposed"
    if own.dim() == 3:
        return _swapped(own, stored) or "has other values"
    return "has other values"


def _swapped(own: Tensor, stored: Tensor) -> str | None:
    """Experts that stand in one another's place."""
    wrong = [expert for expert in range(len(own)) if not torch.equal(own[expert], stored[expert])]
    if any(torch.equal(own[one], stored[other]) for one in wrong for other in wrong):
        return f"has experts {', '.join(map(str, wrong))} in one another's place"
    return f"has other values in expert {', '.join(map(str, wrong))}" if len(wrong) < len(own) else None
