"""Log-probabilities of tokens that were drawn from some of the vocabulary: among those, and from their rows alone.

    log p(t) - log(sum of p(a) over the allowed a),   p from the logits divided by the temperature

Tokens with the same set are computed together, and sets side by side: a chunk is the tokens of some sets against the
rows of all these sets, of which each token sees its own. What an entry of the head adds to a product (scale, soft cap,
adapter), and in which dtype products run, is ``ops.head_chunks``'s, as for any token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.errors import ConfigError
from posttrain_lib.ops.head_chunks import ChunkedHead, HeadGradients, product_dtype
from posttrain_lib.ops.linear_cross_entropy import token_logprobs
from posttrain_lib.ops.output_head import HeadAdapter, OutputHead
from posttrain_lib.schema.allowed_sets import AllowedSets

#: entries of a chunk's logits, 64 MiB in float32, and of its rows of the head; a chunk has a token and a set at least
_CHUNK_ENTRIES = 1 << 24


def allowed_logprobs(
    hidden_TD: Tensor,
    head: OutputHead,
    target_ids_T: Tensor,
    index_N: Tensor,
    allowed: AllowedSets | None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_entries: int = _CHUNK_ENTRIES,
) -> tuple[Tensor, Tensor | None]:
    """Differentiable log-probabilities of the targets among what is allowed at the positions ``index_N``.

    Memory beside the gradients: ``chunk_entries`` logits a few times; a copy of as many entries of the head, or of the
    rows of the largest set, and their gradient.

    Args: as ``ops.linear_cross_entropy.token_logprobs``; ``allowed`` has tensors on the same device, and each target is
        in its set. None: everything is allowed.

    Returns:
        (logprobs_N, entropy_N or None), as ``token_logprobs``; entropies are of the distribution over the set.

    Raises:
        ConfigError: the vocabulary is sharded.
    """
    options: dict[str, Any] = {"temperature": temperature, "with_entropy": with_entropy}
    if allowed is None or not len(allowed.offsets) > 1 or not len(index_N):
        return token_logprobs(hidden_TD, head, target_ids_T, index_N, **options)
    if head.shard is not None:
        raise ConfigError(
            "sets of allowed tokens need the whole output head",
            where="compute.mesh.tensor",
            got=head.shard.group.size(),
            expected=1,
        )
    set_of = allowed.set_of.cpu().numpy()
    bound = torch.from_numpy(np.flatnonzero(set_of >= 0)[np.argsort(set_of[set_of >= 0], kind="stable")])
    free = torch.from_numpy(np.flatnonzero(set_of < 0))
    bound, free = bound.to(index_N.device), free.to(index_N.device)
    widest = chunk_entries // hidden_TD.shape[1]
    plan = _Plan(allowed, tuple(_chunks(set_of, allowed.offsets.cpu().numpy(), chunk_entries, widest)), temperature)
    down, up = (None, None) if head.adapter is None else (head.adapter.down_RD, head.adapter.up_VR)
    where = index_N.index_select(0, bound)
    targets = target_ids_T.index_select(0, where)
    own_sets = allowed.set_of.index_select(0, bound)
    parts = _AllowedLogprobs.apply(hidden_TD, head.weight_VD, down, up, where, targets, own_sets, head, plan)
    if not len(free):
        others: tuple[Tensor | None, ...] = (None, None)
    else:
        others = token_logprobs(hidden_TD, head, target_ids_T, index_N.index_select(0, free), **options)
    logprobs, entropy = (_joined(part, bound, other, free) for part, other in zip(parts, others, strict=True))
    return logprobs, entropy if with_entropy else None


def _joined(part: Tensor, places: Tensor, other: Tensor | None, others: Tensor) -> Tensor:
    joined = part.new_zeros(len(places) + len(others)).index_copy(0, places, part)
    return joined if other is None else joined.index_copy(0, others, other.to(part.dtype))


@dataclass(frozen=True)
class _Chunk:
    """Sets ``begin`` to ``end``, whose ids are ``columns`` of all, and some of the tokens that have one of them."""

    sets: slice
    columns: slice
    rows: slice


@dataclass(frozen=True)
class _Plan:
    allowed: AllowedSets
    chunks: tuple[_Chunk, ...]
    temperature: float


def _chunks(set_of: np.ndarray, offsets: np.ndarray, most: int, widest: int) -> Iterator[_Chunk]:
    """Runs of sets, with their tokens in the order of sets; rows times columns of each are at most ``most``, save for
    single rows, and columns at most ``widest``, or those of the largest set."""
    counts = np.bincount(set_of[set_of >= 0], minlength=len(offsets) - 1)
    widest = max(widest, int(np.diff(offsets).max()))
    starts = np.append(0, counts.cumsum())
    begin = 0
    while begin < len(counts):
        end = begin + 1
        while end < len(counts):
            rows, width = starts[end + 1] - starts[begin], offsets[end + 1] - offsets[begin]
            if rows * width > most or width > widest:
                break
            end += 1
        columns = slice(int(offsets[begin]), int(offsets[end]))
        step = max(1, most // max(1, columns.stop - columns.start))
        for first in range(int(starts[begin]), int(starts[end]), step):
            yield _Chunk(slice(begin, end), columns, slice(first, min(first + step, int(starts[end]))))
        begin = end


class _Pieces:
    """A chunk's products, [rows, columns], and which columns each row sees."""

    def __init__(
        self,
        head: OutputHead,
        hidden_TD: Tensor,
        where_M: Tensor,
        own_M: Tensor,
        plan: _Plan,
        chunk: _Chunk,
        dtype: Any,
    ) -> None:
        allowed = plan.allowed
        self.ids = allowed.ids[chunk.columns]
        adapter = head.adapter
        if adapter is not None:
            adapter = HeadAdapter(adapter.down_RD, adapter.up_VR.index_select(0, self.ids), adapter.scale)
        rows = head.weight_VD.index_select(0, self.ids)
        small = dataclasses.replace(head, weight_VD=rows, vocab_size=None, adapter=adapter)
        self.where = where_M[chunk.rows]
        count = len(self.where)
        self.all = slice(0, count)
        self.chunked = ChunkedHead(
            small, hidden_TD, self.where, chunk_tokens=count, temperature=plan.temperature, dtype=dtype
        )
        places = torch.arange(chunk.columns.start, chunk.columns.stop, device=self.ids.device)
        set_of_column = torch.searchsorted(allowed.offsets, places, right=True) - 1
        self.seen = own_M[chunk.rows, None] == set_of_column
        self.products = self.chunked.products(self.all)

    def logs(self) -> tuple[Tensor, Tensor | None]:
        """(log-probabilities, -inf at what is not seen; what soft caps multiply the gradient with)."""
        logits, steepness = self.chunked.logits(self.products)
        return logits.masked_fill(~self.seen, -math.inf).log_softmax(-1), steepness

    def at_target(self, targets_R: Tensor) -> Tensor:
        """bool [rows, columns]: the target's column among those that are seen."""
        return self.seen & (self.ids == targets_R[:, None])


def _entropy(logs: Tensor) -> Tensor:
    """[rows]; what is not seen adds nothing."""
    return -(logs.exp() * logs.masked_fill(logs == -math.inf, 0)).sum(-1)


class _AllowedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        down_RD: Tensor | None,
        up_VR: Tensor | None,
        where_M: Tensor,
        targets_M: Tensor,
        own_M: Tensor,
        head: OutputHead,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        dtype = product_dtype(hidden_TD, weight_VD)
        wide = torch.promote_types(dtype, torch.float32)
        logprobs, entropy = torch.zeros(2, len(where_M), dtype=wide, device=hidden_TD.device)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for chunk in plan.chunks:
                pieces = _Pieces(head, hidden_TD, where_M, own_M, plan, chunk, dtype)
                logs, _ = pieces.logs()
                logprobs[chunk.rows] = logs.masked_fill(~pieces.at_target(targets_M[chunk.rows]), 0).sum(-1)
                entropy[chunk.rows] = _entropy(logs)
        # The backward computes the logits again, in the forward's dtype: it runs outside the caller's autocast.
        ctx.save_for_backward(hidden_TD, weight_VD, down_RD, up_VR, where_M, targets_M, own_M)
        ctx.head, ctx.plan, ctx.dtype = head, plan, dtype
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, down_RD, up_VR, where_M, targets_M, own_M = ctx.saved_tensors
        adapter = None if down_RD is None else HeadAdapter(down_RD, up_VR, ctx.head.adapter.scale)
        head = dataclasses.replace(ctx.head, weight_VD=weight_VD, adapter=adapter)
        inputs = (hidden_TD, weight_VD, down_RD, up_VR)
        wide = torch.promote_types(ctx.dtype, torch.float32)
        totals = [
            torch.zeros_like(each, dtype=wide) if needed and each is not None else None
            for each, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for chunk in ctx.plan.chunks:
                pieces = _Pieces(head, hidden_TD, where_M, own_M, ctx.plan, chunk, ctx.dtype)
                logs, steepness = pieces.logs()
                pull, entropy_pull = grad_logprobs[chunk.rows, None], grad_entropy[chunk.rows, None]
                # d logprob / d logit = (1 at the target) - p; d entropy / d logit = -p (log p + entropy)
                inner = logs.masked_fill(~pieces.seen, 0) + _entropy(logs)[:, None]
                grad = pieces.at_target(targets_M[chunk.rows]) * pull - logs.exp() * (pull + inner * entropy_pull)
                pieces.products.copy_(grad if steepness is None else grad * steepness)
                _add(totals, pieces)
        return *(
            None if total is None else total.to(each.dtype) for total, each in zip(totals, inputs, strict=True)
        ), *(None,) * 5


def _add(totals: list[Tensor | None], pieces: _Pieces) -> None:
    """Add what a chunk's gradient, in its products, comes to in the hidden states, the weight and the adapter."""
    chunked, (hidden, weight, down, up) = pieces.chunked, totals
    gradients = HeadGradients(chunked, chunked.slope, *(total is not None for total in totals))
    gradients.add(pieces.all, pieces.products)
    if hidden is not None and gradients.rows_ND is not None:
        hidden.index_copy_(0, pieces.where, gradients.rows_ND * chunked.slope)
    if down is not None and gradients.down_RD is not None:
        down.add_(gradients.down_RD)
    # A token of several sets has a row for each of them.
    for total, part in ((weight, gradients.weight_VD), (up, gradients.up_VR)):
        if total is not None and part is not None:
            total.index_add_(0, pieces.ids, part.to(total.dtype))
