"""Cached attention against attention over whole sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain_lib.ops.attention import DocumentLayout, packed_attention
from posttrain_lib.ops.cache import KeyValueCache
from posttrain_lib.ops.reference import packed_attention_reference
from posttrain_lib.schema.shared_prefix import SharedPrefixes
from tests.oracles.prefix_tree import TREE, row_of

# float64: 1e-15 per operation, tens of them, of numbers of size 1
EXACT = 1e-12
CAPACITY = 40
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"window": 3}, {"softcap": 1.5}, {"sinks": True}, {"window": 5, "softcap": 1.5, "sinks": True}],
    ids=["plain", "window", "softcap", "sinks", "all"],
)


def _boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


class Streams:
    """Random queries, keys and values of some sequences, fed to a cache in runs and to the reference whole."""

    def __init__(self, sequences, *, heads=4, key_heads=2, width=8, value_width=8, layer=0, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(heads, width), (key_heads, width), (key_heads, value_width)]
        self.rows = [
            [torch.randn(CAPACITY, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
            for _ in range(sequences)
        ]
        sinks = torch.randn(heads, generator=generator, dtype=torch.float64) if options.pop("sinks", False) else None
        self.layer, self.options = layer, {"scale": 0.4, "sinks_N": sinks, **options}
        self.fed = [0] * sequences

    def feed(self, cache, counts, layout):
        """The largest difference of the new tokens' outputs from the reference's."""
        runs = [
            [part[start : start + count] for part in rows]
            for rows, start, count in zip(self.rows, self.fed, counts, strict=True)
        ]
        query, key, value = (torch.cat(parts) for parts in zip(*runs, strict=True))
        cache.append(self.layer, key, value, layout)
        found = cache.attend(self.layer, query, layout, **self.options)
        self.fed = [start + count for start, count in zip(self.fed, counts, strict=True)]
        expected = [
            packed_attention_reference(*(part[:end] for part in rows), _boundaries([end]), end, **self.options)[
                end - count :
            ]
            for rows, end, count in zip(self.rows, self.fed, counts, strict=True)
        ]
        assert found.shape == (sum(counts), query.shape[1], value.shape[2])
        return float((found - torch.cat(expected)).abs().max())

    def keep(self, order):
        self.rows, self.fed = [self.rows[old] for old in order], [self.fed[old] for old in order]


def _step(cache, counts, *streams):
    layout = DocumentLayout.of(_boundaries(counts), max(counts), cache=cache)
    worst = max(stream.feed(cache, counts, layout) for stream in streams)
    cache.advance(counts)
    return worst


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    steps=st.lists(st.sampled_from(["one", "one", "one", "some"]), max_size=6),
    window=st.sampled_from([None, 1, 2, 5, 100]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    value_width=st.sampled_from([5, 8]),
)
def test_cached_is_uncached(prompt, steps, window, softcap, sinks, heads, value_width):
    options = {"heads": heads[0], "key_heads": heads[1], "value_width": value_width, "sinks": sinks}
    streams = Streams(len(prompt), window=window, softcap=softcap, **options)
    cache = KeyValueCache(len(prompt), CAPACITY)
    assert _step(cache, prompt, streams) <= EXACT
    for kind in steps:
        counts = [1 if kind == "one" else 1 + number % 3 for number in range(len(prompt))]
        assert _step(cache, counts, streams) <= EXACT
    assert cache.lengths.tolist() == streams.fed


@OPTIONS
def test_finished_sequences_leave_and_the_others_go_on(options):
    streams, cache = Streams(5, **options), KeyValueCache(5, CAPACITY)
    worst = [_step(cache, [7, 2, 9, 1, 4], streams), _step(cache, [1] * 5, streams)]
    for keep in ([1, 2, 4], [0, 2], [1]):
        cache.drop(keep)
        streams.keep(keep)
        worst += [_step(cache, [1] * len(keep), streams) for _ in range(3)]
    assert max(worst) <= EXACT
    assert cache.sequences == 1 and cache.lengths.tolist() == [4 + 1 + 9]


@OPTIONS
def test_sequences_may_change_places_and_be_named_twice(options):
    streams, cache = Streams(3, **options), KeyValueCache(3, CAPACITY)
    worst = [_step(cache, [6, 2, 4], streams)]
    for order in ([2, 0, 1], [1, 1, 0, 2]):
        cache.reorder(order)
        streams.keep(order)
        worst += [_step(cache, [1] * len(order), streams), _step(cache, [2] * len(order), streams)]
    assert max(worst) <= EXACT


def test_layers_of_other_shapes_and_windows_share_a_forward():
    cache = KeyValueCache(3, CAPACITY)
    layers = [
        Streams(3, layer=0, seed=1),
        Streams(3, layer=1, seed=2, window=4, key_heads=1),
        Streams(3, layer=5, seed=3, window=2, value_width=3, softcap=2.0, sinks=True),
    ]
    assert max(_step(cache, counts, *layers) for counts in ([5, 1, 3], [1, 1, 1], [1, 1, 1], [2, 4, 1])) <= EXACT


def test_one_layout_may_serve_many_steps():
    """Decoding steps look alike: what the cache works out for one must not be taken for the next."""
    streams, cache = Streams(2, window=3), KeyValueCache(2, CAPACITY)
    layout = DocumentLayout.of(_boundaries([1, 1]), 1, cache=cache)
    _step(cache, [5, 2], streams)
    for _ in range(4):
        assert streams.feed(cache, [1, 1], layout) <= EXACT
        cache.advance([1, 1])


def test_a_sequence_may_rest():
    streams, cache = Streams(3), KeyValueCache(3, CAPACITY)
    assert max(_step(cache, counts, streams) for counts in ([4, 2, 3], [0, 1, 0], [1, 1, 1], [2, 0, 5])) <= EXACT


def test_the_cached_path_is_near_the_packed_one_in_bfloat16():
    query, key, value = (torch.randn(30, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    whole = packed_attention(query, key, value, _boundaries([30]), 30, scale=0.25)
    cache, outputs = KeyValueCache(1, CAPACITY), []
    for begin, end in [(0, 20), *((place, place + 1) for place in range(20, 30))]:
        layout = DocumentLayout.of(_boundaries([end - begin]), end - begin, cache=cache)
        cache.append(0, key[begin:end], value[begin:end], layout)
        outputs.append(cache.attend(0, query[begin:end], layout, scale=0.25))
        cache.advance([end - begin])
    # probabilities and results are rounded to 8 bits in another order; values reach 3
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=0, atol=3 * 2.0**-7)


def test_under_autocast_the_cache_keeps_its_dtype():
    cache = KeyValueCache(1, CAPACITY)
    layout = DocumentLayout.of(_boundaries([4]), 4, cache=cache)
    query, key, value = (torch.randn(4, heads, 8) for heads in (2, 1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.append(0, key, value, layout)
        found = cache.attend(0, query, layout, scale=0.3)
        assert torch.equal(found, packed_attention(query, key, value, layout, 4, scale=0.3))
    assert found.dtype == torch.bfloat16


@OPTIONS
def test_a_decoding_step_has_no_loop_over_sequences(options):
    """As many operations for thirty sequences as for two."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    calls = []
    for sequences in (2, 30):
        streams, cache = Streams(sequences, **options), KeyValueCache(sequences, CAPACITY)
        _step(cache, [1 + number % 4 for number in range(sequences)], streams)
        layout = DocumentLayout.of(_boundaries([1] * sequences), 1, cache=cache)
        query, key, value = (torch.randn(sequences, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
        with Count() as count:
            cache.append(0, key, value, layout)
            cache.attend(0, query, layout, **streams.options)
        calls.append(count.calls)
    assert calls[0] == calls[1]


def test_what_stands_behind_a_short_sequence_is_not_mixed_in():
    """With memory that holds NaN, as it may anywhere: weight 0 times NaN would be NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        streams, cache = Streams(2), KeyValueCache(2, CAPACITY)
        assert max(_step(cache, counts, streams) for counts in ([1, 20], [1, 1])) <= EXACT
    finally:
        torch.use_deterministic_algorithms(before)


def test_states_of_recurrent_layers_go_along():
    cache = KeyValueCache(3, CAPACITY)
    assert cache.state(2) is None
    convolution, memory = torch.arange(6.0).view(3, 2), torch.arange(12.0).view(3, 2, 2)
    cache.set_state(2, (convolution, memory))
    cache.drop([0, 2])
    cache.reorder([1, 0])
    kept = cache.state(2)
    assert kept is not None
    assert torch.equal(kept[0], convolution[[2, 0]]) and torch.equal(kept[1], memory[[2, 0]])
    with pytest.raises(ValueError, match="state of 2 sequences expected"):
        cache.set_state(2, (convolution,))


def test_what_does_not_fit_is_refused_before_anything_is_written():
    streams, cache = Streams(2), KeyValueCache(2, 4)
    assert _step(cache, [3, 1], streams) <= EXACT
    with pytest.raises(ValueError, match="sequence 0 has 3 tokens and room for 4, got 2 more"):
        _step(cache, [2, 1], streams)
    with pytest.raises(ValueError, match="2 sequences are kept, got new tokens of 1"):
        cache.append(0, *(torch.zeros(1, 2, 8, dtype=torch.float64),) * 2, DocumentLayout.of(_boundaries([1]), 1))
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens"):
        cache.advance([1, 4])
    assert cache.lengths.tolist() == [3, 1]
    assert _step(cache, [1, 2], streams) <= EXACT


def test_gradients_and_wrong_numbers_are_refused():
    cache = KeyValueCache(2, CAPACITY)
    layout = DocumentLayout.of(_boundaries([1, 1]), 1, cache=cache)
    rows = torch.zeros(2, 2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no_grad"):
        cache.append(0, rows, rows, layout)
    with torch.no_grad():
        cache.append(0, rows, rows, layout)
    for keep in ([1, 0], [0, 0]):
        with pytest.raises(ValueError, match="in order and named once"):
            cache.drop(keep)
    for order in ([2], [-1]):
        with pytest.raises(ValueError, match="there are 2 sequences"):
            cache.reorder(order)


def test_a_layout_has_a_cache_or_shared_beginnings():
    cu_seqlens, positions, parents = row_of(TREE)
    prefixes = SharedPrefixes.of(cu_seqlens, positions, parents).map(torch.as_tensor)
    with pytest.raises(ValueError, match="whole sequences"):
        DocumentLayout.of(cu_seqlens, 8, prefixes=prefixes, cache=KeyValueCache(len(TREE), CAPACITY))
    # a cache's layout is known to the host, also where a fused kernel will run
    layout = DocumentLayout.of(_boundaries([2, 3]), 3, fused=True, cache=KeyValueCache(2, CAPACITY))
    assert layout.lengths == (2, 3)
