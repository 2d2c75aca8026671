"""The most likely tokens and their log-probabilities, without the full logits."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain_lib.errors import ConfigError
from posttrain_lib.ops.head_chunks import ChunkedHead
from posttrain_lib.ops.output_head import OutputHead


@torch.no_grad()
def top_logprobs(
    hidden_TD: Tensor,
    head: OutputHead,
    index_N: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` most likely tokens at the positions ``index_N``, equal ones in no particular order. No gradient.

    Args: as ``ops.linear_cross_entropy.token_logprobs``.

    Returns:
        (logprobs_NK, ids_NK): float32 (float64 for float64 inputs) falling along K; int64.

    Raises:
        ConfigError: k is not within the vocabulary.
    """
    if not 0 < k <= head.entries:
        raise ConfigError("k is not within the vocabulary", got=k, expected=f"1 to {head.entries}")
    chunked = ChunkedHead(head, hidden_TD, index_N, chunk_tokens=chunk_tokens, temperature=temperature)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logprobs = torch.empty((chunked.count, k), dtype=chunked.wide, device=hidden_TD.device)
        ids = torch.empty((chunked.count, k), dtype=torch.int64, device=hidden_TD.device)
        for chunk in chunked.chunks():
            products = chunked.products(chunk)
            for rows in chunked.blocks(chunk):
                logits, _ = chunked.logits(products[rows.start - chunk.start : rows.stop - chunk.start])
                highest, ids[rows] = _top(chunked, logits, k)
                logprobs[rows] = highest - chunked.softmax_(logits)
    return logprobs, ids


def _top(chunked: ChunkedHead, logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(logits, ids) [B, k] of the highest, over all ranks."""
    here = min(k, logits_BV.shape[1])
    highest, ids = logits_BV.topk(here, dim=-1)
    if chunked.group is None:
        return highest, ids
    # A rank with fewer than k entries adds some that lose against any that exist.
    blank = (highest.shape[0], k - here)
    highest = torch.cat([highest, highest.new_full(blank, -math.inf)], dim=1)
    ids = torch.cat([ids + chunked.head.first, ids.new_zeros(blank)], dim=1)
    both = []
    for mine in (highest, ids):
        parts = [torch.empty_like(mine) for _ in range(chunked.group.size())]
        dist.all_gather(parts, mine, group=chunked.group)
        both.append(torch.cat(parts, dim=1))
    best, places = both[0].topk(k, dim=-1)
    return best, both[1].gather(1, places)
