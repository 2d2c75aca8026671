"""Drawing tokens: one uniform number per token, from a stream that belongs to the sequence alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_NUMBERS_AT_ONCE = 128


class Stream:
    """The uniform numbers of one sequence, from its seed (0 to 2**64 - 1) alone."""

    def __init__(self, seed: int) -> None:
        self._numbers = _numbers(np.random.Generator(np.random.Philox(key=seed)))

    def draw(self) -> float:
        """The next number, in [0, 1)."""
        return next(self._numbers)


def _numbers(generator: np.random.Generator) -> Iterator[float]:
    """Made some at a time: one call for each number takes longer than the number."""
    while True:
        yield from generator.random(_NUMBERS_AT_ONCE).tolist()


def seed_of(seed: int, prompt: Sequence[int], number: int) -> int:
    """The seed of a prompt's sample of that number: a prompt draws the same wherever it stands among others."""
    ids = np.asarray(prompt, dtype="<i8").tobytes()
    digest = hashlib.sha256(f"{seed} {number} ".encode() + ids).digest()
    return int.from_bytes(digest[:8], "little")


def sampled(logits_nV: Tensor, draws_n: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token at which the cumulative probability passes each draw: int64 [n].

    Probabilities are summed in the order of ids, not of likelihood: two tokens of nearly the same logit may change
    places when logits are rounded otherwise, and every draw between would then give the other one.

    Args:
        logits_nV: of the next token. draws_n: float64, in [0, 1).
        temperature, top_p: as ``evaluation.generation.sample_generate``.
    """
    probabilities = torch.softmax(logits_nV.double() / temperature, dim=-1)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(dim=-1)
    # Of the last sum, not of 1, for it is what the others were rounded with; and below it, whatever the product rounds
    # to, for behind it stand tokens of no probability.
    whole = cumulative[:, -1:]
    wanted = torch.minimum(draws_n.double()[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def _nucleus(probabilities_nV: Tensor, top_p: float) -> Tensor:
    """The same with 0 for what is outside the smallest set of most likely tokens that has ``top_p`` together."""
    ordered, ids = probabilities_nV.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities_nV).scatter(-1, ids, ordered)
