"""Sequences that join a cache and leave it between forwards: each is attended as if it had been alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.cache import KeyValueCache
from posttrain_lib.ops.reference import packed_attention_reference

# float64: 1e-15 per operation, tens of them, of numbers of size 1
EXACT = 1e-12
ROWS, LONGEST, WINDOW = 5, 40, 6


class Sequences:
    """Random queries, keys and values of sequences by name, and the recurrent state that counts their tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parts = torch.randn(3, 200, LONGEST, 2, 4, generator=generator, dtype=torch.float64)

    def run(self, cache: KeyValueCache, names: list[int], counts: list[int]) -> float:
        """A forward of new tokens in two layers; the largest difference of attention from the reference's."""
        before = cache.lengths.tolist()
        boundaries = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        layout = DocumentLayout.of(boundaries, max(counts), cache=cache)
        spans = [(name, start, start + count) for name, start, count in zip(names, before, counts, strict=True)]
        query, key, value = (torch.cat([part[name, start:end] for name, start, end in spans]) for part in self.parts)
        worst = 0.0
        for layer, window in ((0, None), (3, WINDOW)):
            cache.append(layer, key, value, layout)
            found = cache.attend(layer, query, layout, scale=0.5, window=window)
            expected = [
                packed_attention_reference(
                    *(part[name, :end] for part in self.parts),
                    torch.tensor([0, end], dtype=torch.int32),
                    end,
                    scale=0.5,
                    window=window,
                )[start:]
                for name, start, end in spans
            ]
            worst = max(worst, float((found - torch.cat(expected)).abs().max()))
        state = cache.state(1)
        kept = torch.zeros(len(names), 2) if state is None else state[0]
        assert kept[:, 0].tolist() == before
        cache.set_state(1, [kept + torch.tensor(counts)[:, None]])
        cache.advance(counts)
        return worst


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 5), max_size=3), st.integers(0, 3), st.randoms()), min_size=1, max_size=8
    )
)
def test_joined_and_moved_is_alone(rounds) -> None:
    """Each round some leave, prompts are run elsewhere and join, one of them twice, and all run a token."""
    sequences, cache, names, prompts = Sequences(), KeyValueCache(0, 4, rows=ROWS), [], 0
    for lengths, leaving, chance in rounds:
        gone = chance.sample(range(len(names)), min(leaving, len(names)))
        order = cache.remove(gone)
        assert sorted(order) == [place for place in range(len(names)) if place not in gone]
        names = [names[old] for old in order]
        lengths = lengths[: ROWS - len(names)]
        if lengths:
            other, new = KeyValueCache(len(lengths), 5), list(range(prompts, prompts + len(lengths)))
            prompts += len(lengths)
            assert sequences.run(other, new, lengths) < EXACT
            numbers = list(range(len(lengths))) + ([0] if len(names) + len(lengths) < ROWS else [])
            cache.grow(5)
            cache.join(other, numbers)
            names += [new[number] for number in numbers]
        if names:
            cache.grow(int(cache.lengths.max()) + 1)
            assert sequences.run(cache, names, [1] * len(names)) < EXACT
            assert cache.sequences == len(names)


def test_what_a_row_held_before_does_not_reach_who_joins() -> None:
    sequences, cache = Sequences(), KeyValueCache(0, 8, rows=2)
    spoiled, clean = KeyValueCache(2, 8), KeyValueCache(2, 3)
    for part in sequences.parts:
        part[8:10] = float("nan")
    sequences.run(spoiled, [8, 9], [8, 8])
    cache.join(spoiled, [0, 1])
    cache.remove([0, 1])
    sequences.run(clean, [0, 1], [3, 1])
    cache.join(clean, [0, 1])
    assert sequences.run(cache, [0, 1], [1, 1]) < EXACT


def test_what_does_not_fit_is_refused() -> None:
    sequences, cache, other = Sequences(), KeyValueCache(0, 4, rows=2), KeyValueCache(2, 5)
    sequences.run(other, [0, 1], [5, 3])
    with pytest.raises(ValueError, match="3 sequences of up to 3 tokens do not fit"):
        cache.join(other, [1, 1, 1])
    with pytest.raises(ValueError, match="1 sequences of up to 5 tokens do not fit"):
        cache.join(other, [0])
    cache.join(other, [1])
    for wrong in ([1], [0, 0], [-1]):
        with pytest.raises(ValueError, match="there are 1 sequences"):
            cache.remove(wrong)
    assert cache.lengths.tolist() == [3]
