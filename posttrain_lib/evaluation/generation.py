"""Greedy and sampled generation, and token log-probs, over our own definitions.

Prompts are packed into one forward and fill a cache of keys, values and recurrent states; every further step runs one
token of each unfinished sequence. It is the forward that trains, for every family.

A sequence that grows beyond longrope's bound is another one from its first token on, and is run again whole, once. The
likeliest next token may jump there: that is the model, not the cache. It is what transformers' ``generate`` gives
without its cache; with it, transformers 5.10 drops the kept tokens there, but goes on from the last one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from posttrain_lib.evaluation.sampling import Stream, sampled
from posttrain_lib.ops import linear_cross_entropy as ops
from posttrain_lib.ops.cache import KeyValueCache

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead

#: tokens in one packed forward; bounds memory
_TOKENS_PER_FORWARD = 8192
#: tokens for which one cache has room; bounds its memory
_TOKENS_PER_CACHE = 131072

#: (logits [n, V], the place of each sequence in its group) -> the next token of each
Choose = Callable[[Tensor, Sequence[int]], list[int]]


@torch.no_grad()
def greedy_generate(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Iterable[int]
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and with the first stop token or ``max_new_tokens``.

    Ties go to the smaller id, so the result depends on the weights alone.
    """

    def most_likely(logits_nV: Tensor, _: Sequence[int]) -> list[int]:
        return logits_nV.argmax(dim=-1).tolist()

    return _generate_all(model, prompts, max_new_tokens, frozenset(stop_ids), lambda group: most_likely)


@torch.no_grad()
def sample_generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    *,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """A random continuation of each prompt, up to and with the first stop token or ``max_new_tokens``.

    Each prompt draws from a stream of its own: which others it is computed with changes nothing, but that logits
    rounded otherwise may move a draw that falls on the border of two tokens.

    Args:
        seeds: one for each prompt, below 2**64; see ``evaluation.sampling.seed_of``.
        temperature: divides the logits, above 0.
        top_p: draw from the smallest set of most likely tokens of at least this probability together (nucleus
            sampling, Holtzman et al. 2020), above 0 and at most 1.

    Raises:
        ValueError: a temperature or top_p outside its range, or not one seed per prompt.
    """
    if not temperature > 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be above 0 and top_p in (0, 1], got {temperature} and {top_p}")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need a seed each, got {len(seeds)}")

    def drawing(group: Sequence[int]) -> Choose:
        streams = [Stream(seeds[index]) for index in group]

        def draw(logits_nV: Tensor, places: Sequence[int]) -> list[int]:
            draws = torch.tensor([streams[place].draw() for place in places], dtype=torch.float64)
            return sampled(logits_nV, draws.to(logits_nV.device), temperature, top_p).tolist()

        return draw

    return _generate_all(model, prompts, max_new_tokens, frozenset(stop_ids), drawing)


def _generate_all(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    most: int,
    stops: frozenset[int],
    choosing: Callable[[Sequence[int]], Choose],
) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in prompts]
    # Like lengths together: every sequence of a group gets as much room as the longest.
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for group in _groups(by_length if most > 0 else (), prompts, most):
        _generate(
            model, [prompts[index] for index in group], most, stops, [completions[i] for i in group], choosing(group)
        )
    return completions


def _generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    most: int,
    stops: frozenset[int],
    completions: Sequence[list[int]],
    choose: Choose,
) -> None:
    """Extend each completion in place."""
    cache = KeyValueCache(len(prompts), max(map(len, prompts)) + most)
    active, new = list(range(len(prompts))), [list(prompt) for prompt in prompts]
    for _ in range(most):
        for place, (kept, tokens) in enumerate(zip(cache.lengths.tolist(), new, strict=True)):
            if model.config.changes_rope(kept, kept + len(tokens)):
                cache.forget([place])
                new[place] = [*prompts[active[place]], *completions[active[place]]]
        tokens = choose(next_logits(model, new, cache), active)
        for index, token in zip(active, tokens, strict=True):
            completions[index].append(token)
        keep = [place for place, token in enumerate(tokens) if token not in stops]
        if not keep:
            break
        if len(keep) < len(active):
            cache.drop(keep)
        active, new = [active[place] for place in keep], [[tokens[place]] for place in keep]


def next_logits(model: Decoder, new: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
    """Logits [n, V] behind the ``new`` tokens of each sequence, which the cache keeps from now on."""
    tokens, positions, boundaries, longest = _pack(new, model, cache.lengths)
    last = boundaries[1:].long() - 1
    logits = model(tokens, positions, boundaries, longest, lambda hidden, head: head.logits(hidden[last]), cache=cache)
    cache.advance([len(each) for each in new])
    return logits


@torch.no_grad()
def token_logprobs(
    model: Decoder, sequences: Sequence[Sequence[int]], begins: Sequence[int] | None = None
) -> list[list[float]]:
    """Log-probability of the tokens of each sequence from ``begins`` on, at least 1 (default), given those before."""
    begins = [1] * len(sequences) if begins is None else begins
    results: list[list[float]] = []
    for group in _groups(range(len(sequences)), sequences):
        tokens, positions, boundaries, longest = _pack([sequences[i] for i in group], model)
        targets = torch.cat([tokens[1:], tokens[:1]])
        counts = [max(0, len(sequences[i]) - begins[i]) for i in group]
        ends = boundaries[1:].tolist()
        wanted = [t for end, count in zip(ends, counts, strict=True) for t in range(end - 1 - count, end - 1)]
        index = torch.tensor(wanted, dtype=torch.int64, device=tokens.device)

        def score(hidden: Tensor, head: OutputHead, targets: Tensor = targets, index: Tensor = index) -> Tensor:
            return ops.token_logprobs(hidden, head, targets, index)[0]

        values = model(tokens, positions, boundaries, longest, score).tolist()
        for count in counts:
            results.append(values[:count])
            values = values[count:]
    return results


def _pack(
    sequences: Sequence[Sequence[int]], model: Decoder, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(tokens, positions, boundaries, longest) of what a forward takes; ``kept`` int64 [n] tokens lie before each."""
    device = model.head_weight.device
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    ends = lengths.cumsum(0)
    before = lengths - ends if kept is None else lengths - ends + kept
    positions = torch.arange(len(tokens)) + before.repeat_interleave(lengths)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)
    return tokens.to(device), positions.to(device), boundaries.to(device), int(lengths.max())


def _groups(indices: Iterable[int], sequences: Sequence[Sequence[int]], room: int = 0) -> Iterator[list[int]]:
    """Runs of indices whose sequences fit into one forward together, and with ``room`` more tokens each into a cache.

    A cache has as much room for each sequence as for the longest: where there is one, lengths must not fall.
    """
    group: list[int] = []
    tokens = 0
    for index in indices:
        length = len(sequences[index])
        crowded = room > 0 and (len(group) + 1) * (length + room) > _TOKENS_PER_CACHE
        if group and (crowded or tokens + length > _TOKENS_PER_FORWARD):
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += length
    if group:
        yield group
