"""Experts under rounding: which ones a token goes through is a choice, and two that score alike may swap.

A swapped expert is no rounding error in the logits: it is another function. So the choices of one run are recorded,
and the runs compared with it are told them: a token whose own choice is another one takes the recorded experts and
weights. How many did is counted, and has a limit of its own; every other token goes by its own router.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: layer -> (expert ids [T, k], weights [T, k])
Choices = Mapping[int, tuple[Tensor, Tensor]]


@dataclass
class Routing:
    """What one run's routers chose of themselves: ``choices`` by layer, and the tokens ``swapped`` [T] bool that were
    told another choice."""

    parts: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    told: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def choices(self) -> dict[int, tuple[Tensor, Tensor]]:
        """All documents, end to end."""
        return {
            layer: (torch.cat([ids for ids, _ in parts]), torch.cat([weights for _, weights in parts]))
            for layer, parts in self.parts.items()
        }

    @property
    def swaps(self) -> int:
        """Choices, of tokens and layers, that were not what was told."""
        return sum(int(mask.sum()) for masks in self.told.values() for mask in masks)

    @property
    def count(self) -> int:
        """All choices."""
        return sum(len(ids) for parts in self.parts.values() for ids, _ in parts)

    def swapped(self, tokens: int) -> Tensor:
        """bool [T]: tokens with a swap in some layer."""
        found = torch.zeros(tokens, dtype=torch.bool)
        for masks in self.told.values():
            found |= torch.cat(masks)
        return found


def swap_limit(own: int) -> float:
    """Swaps that rounding explains where the reference's own precision moves ``own``: two counts of one rate differ by
    less than four standard deviations of their difference."""
    return own + 4 * math.sqrt(2 * own + 1)


def dense(choice: tuple[Tensor, Tensor], experts: int) -> Tensor:
    """[T, E] weights by expert, for comparison: the order of a token's experts does not count."""
    ids, weights = choice
    return torch.zeros(len(ids), experts, dtype=torch.float64).scatter_(1, ids, weights.double())


@contextmanager
def routed(modules: Iterable[tuple[int, nn.Module]], told: Choices | None = None) -> Iterator[Routing]:
    """Record what goes into experts, modules called with (hidden, expert ids [T, k], weights [T, k]).

    Args:
        modules: (layer, its experts).
        told: of an earlier run over the same tokens in the same order.
    """
    routing = Routing()

    def before(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, ids, weights, *rest = *args, *kwargs.values()
        parts = routing.parts.setdefault(layer, [])
        begin = sum(len(part) for part, _ in parts)
        parts.append((ids.detach(), weights.detach()))
        if told is None:
            return None
        other_ids, other_weights = (value[begin : begin + len(ids)] for value in told[layer])
        swapped = (ids.sort(-1).values != other_ids.sort(-1).values).any(-1)
        routing.told.setdefault(layer, []).append(swapped)
        ids = torch.where(swapped[:, None], other_ids, ids)
        weights = torch.where(swapped[:, None], other_weights.to(weights.dtype), weights)
        return (hidden, ids, weights, *rest), {}

    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, kwargs, layer=layer: before(layer, args, kwargs), with_kwargs=True
        )
        for layer, module in modules
    ]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()
