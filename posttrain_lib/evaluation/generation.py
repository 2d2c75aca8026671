"""Greedy generation and token log-probs over our own definitions, packed and uncached.

Every step runs all unfinished sequences again as packed documents. That costs a forward of the whole prefix per new
token, which short answers on small models do not feel, and it uses the very path that trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from posttrain_lib.ops import linear_cross_entropy as head

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder

#: tokens in one packed forward; bounds memory
_TOKENS_PER_FORWARD = 8192


@torch.no_grad()
def greedy_generate(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Iterable[int]
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and with the first stop token or ``max_new_tokens``.

    Ties go to the smaller id, so the result depends on the weights alone.
    """
    stops = set(stop_ids)
    sequences = [list(prompt) for prompt in prompts]
    completions: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        finished = set()
        for group in _groups(active, sequences):
            for index, token in zip(group, _next_tokens(model, [sequences[i] for i in group]), strict=True):
                sequences[index].append(token)
                completions[index].append(token)
                if token in stops:
                    finished.add(index)
        active = [index for index in active if index not in finished]
        if not active:
            break
    return completions


@torch.no_grad()
def token_logprobs(model: Decoder, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every token but the first, given those before it, for each sequence."""
    results: list[list[float]] = []
    for group in _groups(range(len(sequences)), sequences):
        tokens, positions, boundaries, longest = _pack([sequences[i] for i in group], model)
        targets = torch.cat([tokens[1:], tokens[:1]])
        last = set((boundaries[1:] - 1).tolist())
        index = torch.tensor([t for t in range(len(tokens)) if t not in last], device=tokens.device)

        def score(hidden: Tensor, weight: Tensor, targets: Tensor = targets, index: Tensor = index) -> Tensor:
            return head.token_logprobs(hidden, weight, targets, index)[0]

        values = model(tokens, positions, boundaries, longest, score).tolist()
        for i in group:
            count = len(sequences[i]) - 1
            results.append(values[:count])
            values = values[count:]
    return results


def _next_tokens(model: Decoder, sequences: list[Sequence[int]]) -> list[int]:
    tokens, positions, boundaries, longest = _pack(sequences, model)
    last = boundaries[1:].long() - 1
    logits = model(tokens, positions, boundaries, longest, lambda hidden, weight: linear(hidden[last], weight))
    return logits.argmax(dim=-1).tolist()


def _pack(sequences: Sequence[Sequence[int]], model: Decoder) -> tuple[Tensor, Tensor, Tensor, int]:
    device = model.head_weight.device
    lengths = [len(sequence) for sequence in sequences]
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    boundaries = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return tokens, positions, boundaries, max(lengths)


def _groups(indices: Iterable[int], sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Runs of indices whose sequences fit into one forward together."""
    group: list[int] = []
    tokens = 0
    for index in indices:
        if group and tokens + len(sequences[index]) > _TOKENS_PER_FORWARD:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += len(sequences[index])
    if group:
        yield group
