"""The gated delta rule over packed documents: linear attention whose memory forgets and corrects itself.

Per head the memory S [H, V] takes in a token with key k, value v, decay a = exp(log_decay) and strength b, and answers
its query q:

    S <- a * S;   S <- S + k (b * (v - S^T k))^T;   out = S^T (scale * q)

(Gated Delta Networks, Yang, Kautz and Hatamizadeh 2024; transformers' ``torch_recurrent_gated_delta_rule``.) One token
after another that is ``ops.reference.gated_delta_rule_reference``. Here documents are cut into chunks. Within a chunk
the corrections of its tokens depend on each other through a unit lower triangular system; it is solved for all chunks
of all documents at once, so that what is left in sequence is a few products per chunk, for all documents together that
still have one. transformers' ``torch_chunk_gated_delta_rule`` does the same for one batch of equal lengths.

Every document starts from its own state. Its last chunk is filled up with tokens of strength 0 and decay 1, which
change no memory and answer nothing, and which are zeros, not a neighbour's numbers.

N heads, H key dim, V value dim, n documents, M chunks of C tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.short_convolution import PickRows, refuse_shared_prefixes

#: added to the squared length of a query or key before its root, as in the reference implementations
_NORM_EPS = 1e-6


def gated_delta_rule(
    query_TNH: Tensor,
    key_TNH: Tensor,
    value_TNV: Tensor,
    log_decay_TN: Tensor,
    beta_TN: Tensor,
    layout: DocumentLayout,
    *,
    scale: float,
    normalise: bool,
    initial_state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Outputs and final memories of each document.

    Everything is computed in float32 (float64 for float64 inputs), under autocast too: the memory is a sum over the
    whole document. That includes the lengths of queries and keys, which transformers' function rounds to their dtype.

    Args:
        query_TNH, key_TNH: [T, N, H]; heads that share a key are repeated by the caller. value_TNV: [T, N, V].
        log_decay_TN: [T, N], at most 0. beta_TN: [T, N], the strength of a token's correction, in (0, 1).
        layout: whole documents of at least one token. Where its lengths are not on the host they are read back.
        scale: factor on the queries.
        normalise: divide queries and keys by their length first.
        initial_state: [n, N, H, V], the memory before each document's first token; None = zeros.
        chunk: tokens solved together, at most; less where all documents are shorter. In decoding it comes to 1.

    Returns:
        (out_TNV in the dtype of the queries, final_state [n, N, H, V] in float32 at least), differentiable.

    Raises:
        ConfigError: documents that share a beginning.
    """
    refuse_shared_prefixes(layout, "a recurrence along documents")
    device, dtype = query_TNH.device, query_TNH.dtype
    wide = torch.promote_types(dtype, torch.float32)
    lengths = layout.host_lengths()
    # chunks as short as the longest document allows: half of a chunk or more is padding otherwise
    plan = _plan(lengths, min(chunk, 1 << (max(lengths) - 1).bit_length()))
    with torch.autocast(device.type, enabled=False):
        query, key, value, log_decay, beta = (
            item.to(wide) for item in (query_TNH, key_TNH, value_TNV, log_decay_TN, beta_TN)
        )
        if normalise:
            query, key = _normalised(query), _normalised(key)
        slots, rank, rank_order = (
            torch.from_numpy(item).to(device) for item in (plan.slots, plan.rank, plan.rank_order)
        )
        chunks = [_to_chunks(item, slots, plan) for item in (query * scale, key, value, log_decay, beta)]
        state = (
            value.new_zeros((len(lengths), *key.shape[1:], value.shape[2]))
            if initial_state is None
            else initial_state.to(wide)
        )
        outputs, finals = _along_chunks(*_within_chunks(*chunks), state.index_select(0, rank_order), plan.active)
        # [M, N, C, V] -> tokens in their order
        output = PickRows.apply(outputs.transpose(1, 2).flatten(0, 1), slots)
        return output.to(dtype), finals.index_select(0, rank)


@dataclass(frozen=True)
class _Plan:
    """Where each token lies among the chunks. Documents with more chunks come first (rank 0 on), and chunks lie step by
    step: the first chunks of all documents by rank, then the second ones of those that have one, and so on. So the
    documents that a step works on are always the first ones of the step before.

    slots int64 [T]: of each token, chunk * C + place. active: documents with a chunk at each step.
    rank int64 [n]: of each document. rank_order int64 [n]: the document of each rank.
    """

    slots: np.ndarray
    rank: np.ndarray
    rank_order: np.ndarray
    active: tuple[int, ...]
    chunk: int

    @property
    def chunks(self) -> int:
        return sum(self.active)


@lru_cache(maxsize=32)
def _plan(lengths: tuple[int, ...], chunk: int) -> _Plan:
    """Numpy alone, so that the layers of a model share one plan whatever mode torch is in."""
    sizes = np.asarray(lengths, np.int64)
    steps = -(-sizes // chunk)
    rank_order = np.argsort(-steps, kind="stable")
    rank = np.empty_like(rank_order)
    rank[rank_order] = np.arange(len(sizes))
    active = (steps[None, :] > np.arange(steps.max())[:, None]).sum(1)
    begin = np.cumsum(active) - active
    document = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    slots = (begin[place // chunk] + rank[document]) * chunk + place % chunk
    return _Plan(slots, rank, rank_order, tuple(active.tolist()), chunk)


def _normalised(heads: Tensor) -> Tensor:
    return heads * torch.rsqrt(heads.pow(2).sum(-1, keepdim=True) + _NORM_EPS)


def _to_chunks(rows: Tensor, slots: Tensor, plan: _Plan) -> Tensor:
    """[T, N, ...] -> [M, N, C, ...], zeros where a chunk has no token."""
    padded = rows.new_zeros((plan.chunks * plan.chunk, *rows.shape[1:])).index_copy(0, slots, rows)
    return padded.unflatten(0, (plan.chunks, plan.chunk)).transpose(1, 2)


def _within_chunks(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What of each chunk does not depend on the memory that it finds. All [M, N, C, ...]; queries are scaled.

    With G the running sum of the log decays and S the memory before the chunk, the corrections U [C, V] solve
    ``(1 + L) U = beta (v - exp(G) k S)`` where ``L[i, j] = beta[i] exp(G[i] - G[j]) k[i] k[j]`` for j < i.

    Returns:
        corrections [C, V] for an empty memory, reading [C, H] (U = corrections - reading S), query exp(G) [C, H],
        mixing [C, C] (out = query exp(G) S + mixing U), keys as they stand at the chunk's end [C, H], and the whole
        chunk's decay [1, 1].
    """
    total = log_decay.cumsum(-1)
    later = torch.ones(key.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).triu(1)
    # The mask goes in before the exponential, which would overflow there, and infinity times 0 is no gradient.
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    turned = key.transpose(-1, -2)
    system = beta[..., None] * (key @ turned) * decay  # its diagonal is not read: taken as ones
    known = torch.cat((value, key * total.exp()[..., None]), -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    corrections, reading = solved.split((value.shape[-1], key.shape[-1]), -1)
    end = total[..., -1:]
    at_end = key * (end - total).exp()[..., None]
    return corrections, reading, query * total.exp()[..., None], (query @ turned) * decay, at_end, end.exp()[..., None]


def _along_chunks(
    corrections: Tensor,
    reading: Tensor,
    query: Tensor,
    mixing: Tensor,
    keys_at_end: Tensor,
    decay: Tensor,
    state: Tensor,
    active: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Step by step through the chunks: outputs [M, N, C, V] and final memories [n, N, H, V], both by rank."""
    outputs, finals = [], []
    parts = (item.split(active) for item in (corrections, reading, query, mixing, keys_at_end, decay))
    for correction, read, asked, mix, at_end, forget in zip(*parts, strict=True):
        if len(correction) < len(state):
            finals.append(state[len(correction) :])
            state = state[: len(correction)]
        update = correction - read @ state
        outputs.append(asked @ state + mix @ update)
        state = forget * state + at_end.transpose(-1, -2) @ update
    finals.append(state)
    return torch.cat(outputs), torch.cat(finals[::-1])
