"""The next token of each sequence, and its log-probability, out of the same logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

#: entries of the vocabulary that are summed together before a draw looks among them
_BLOCK = 256


def next_tokens(
    logits_nV: Tensor, temperatures: Sequence[float], draws: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities; NaN where a sequence's logits are no distribution (NaN, or nothing allowed).

    A draw in [0, 1) gives the token at which the cumulative probability, in the order of ids, passes it, as
    ``evaluation.sampling.sampled`` does; here it is searched among sums of blocks first, so that a large vocabulary is
    read and not sorted, widened or summed up entry by entry. Temperature 0 takes the most likely token, ties to the
    lowest id, and its log-probability at temperature 1. Arithmetic is in float32, in float64 where the logits are; sums
    in float64.
    """
    device = logits_nV.device
    logits = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    scaled = logits
    if any(temperature not in (0, 1) for temperature in temperatures):
        divisors = torch.tensor([temperature or 1.0 for temperature in temperatures], dtype=logits.dtype, device=device)
        scaled = logits / divisors[:, None]
    top, likeliest = scaled.max(dim=-1, keepdim=True)
    weights = (scaled - top).exp_()
    blocks = pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(dim=-1, dtype=torch.float64)
    edges = sums.cumsum(dim=-1)
    tokens = likeliest
    if any(temperatures):
        tokens = _drawn(blocks, sums, edges, torch.tensor(draws, dtype=torch.float64, device=device)[:, None])
        if not all(temperatures):
            greedy = torch.tensor([temperature == 0 for temperature in temperatures], device=device)
            tokens = torch.where(greedy[:, None], likeliest, tokens)
    # A sum that is NaN leaves the search at the end of its list.
    tokens = tokens.clamp(max=logits.shape[1] - 1)
    logprobs = scaled.gather(1, tokens) - top - edges[:, -1:].log().to(logits.dtype)
    return tokens[:, 0].tolist(), logprobs[:, 0].tolist()


def _drawn(blocks_nBS: Tensor, sums_nB: Tensor, edges_nB: Tensor, draws_n1: Tensor) -> Tensor:
    """int64 [n, 1]."""
    whole = edges_nB[:, -1:]
    wanted = _below(draws_n1 * whole, whole)
    block = torch.searchsorted(edges_nB, wanted, right=True).clamp(max=edges_nB.shape[1] - 1)
    before = edges_nB.gather(1, block) - sums_nB.gather(1, block)
    row = torch.arange(len(block), device=block.device)
    inside = blocks_nBS[row, block[:, 0]].double().cumsum(dim=-1)
    # The block's own sum was rounded in another order: what is wanted must lie in this one.
    place = torch.searchsorted(inside, _below((wanted - before).clamp(min=0), inside[:, -1:]), right=True)
    return block * _BLOCK + place


def _below(value: Tensor, bound: Tensor) -> Tensor:
    """The value, below the bound whatever it was rounded to: behind the bound stand tokens of no probability."""
    return torch.minimum(value, torch.nextafter(bound, torch.zeros_like(bound)))
