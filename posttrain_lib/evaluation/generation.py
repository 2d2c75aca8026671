"""Greedy generation and token log-probs over our own definitions.

Prompts are packed into one forward and fill a cache of keys, values and recurrent states; every further step runs one
token of each unfinished sequence. It is the forward that trains, for every family.

A sequence that grows beyond longrope's bound is another one from its first token on, and is run again whole, once. The
likeliest next token may jump there: that is the model, not the cache. It is what transformers' ``generate`` gives
without its cache; with it, transformers 5.10 drops the kept tokens there, but goes on from the last one alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain_lib.ops import linear_cross_entropy as ops
from posttrain_lib.ops.cache import KeyValueCache

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead

#: tokens in one packed forward; bounds memory
_TOKENS_PER_FORWARD = 8192


@torch.no_grad()
def greedy_generate(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Iterable[int]
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and with the first stop token or ``max_new_tokens``.

    Ties go to the smaller id, so the result depends on the weights alone.
    """
    stops = frozenset(stop_ids)
    completions: list[list[int]] = [[] for _ in prompts]
    # Like lengths together: every sequence of a group gets as much room as the longest.
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for group in _groups(by_length if max_new_tokens > 0 else (), prompts):
        _generate(model, [prompts[index] for index in group], max_new_tokens, stops, [completions[i] for i in group])
    return completions


def _generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    most: int,
    stops: frozenset[int],
    completions: Sequence[list[int]],
) -> None:
    """Extend each completion in place."""
    cache = KeyValueCache(len(prompts), max(map(len, prompts)) + most)
    active, new = list(completions), [list(prompt) for prompt in prompts]
    begun = list(prompts)
    for _ in range(most):
        for place, (kept, tokens) in enumerate(zip(cache.lengths.tolist(), new, strict=True)):
            if model.config.changes_rope(kept, kept + len(tokens)):
                cache.forget([place])
                new[place] = [*begun[place], *active[place]]
        tokens = _next_tokens(model, new, cache)
        for completion, token in zip(active, tokens, strict=True):
            completion.append(token)
        keep = [place for place, token in enumerate(tokens) if token not in stops]
        if not keep:
            break
        if len(keep) < len(active):
            cache.drop(keep)
        active, new = [active[place] for place in keep], [[tokens[place]] for place in keep]
        begun = [begun[place] for place in keep]


def _next_tokens(model: Decoder, new: Sequence[Sequence[int]], cache: KeyValueCache) -> list[int]:
    """The most likely token behind the ``new`` tokens of each sequence, which the cache keeps from now on."""
    tokens, positions, boundaries, longest = _pack(new, model)
    counts = [len(each) for each in new]
    positions = positions + cache.lengths.to(positions.device).repeat_interleave(
        torch.tensor(counts, device=positions.device)
    )
    last = boundaries[1:].long() - 1
    logits = model(tokens, positions, boundaries, longest, lambda hidden, head: head.logits(hidden[last]), cache=cache)
    cache.advance(counts)
    return logits.argmax(dim=-1).tolist()


@torch.no_grad()
def token_logprobs(model: Decoder, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every token but the first, given those before it, for each sequence."""
    results: list[list[float]] = []
    for group in _groups(range(len(sequences)), sequences):
        tokens, positions, boundaries, longest = _pack([sequences[i] for i in group], model)
        targets = torch.cat([tokens[1:], tokens[:1]])
        last = set((boundaries[1:] - 1).tolist())
        index = torch.tensor([t for t in range(len(tokens)) if t not in last], device=tokens.device)

        def score(hidden: Tensor, head: OutputHead, targets: Tensor = targets, index: Tensor = index) -> Tensor:
            return ops.token_logprobs(hidden, head, targets, index)[0]

        values = model(tokens, positions, boundaries, longest, score).tolist()
        for i in group:
            count = len(sequences[i]) - 1
            results.append(values[:count])
            values = values[count:]
    return results


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
