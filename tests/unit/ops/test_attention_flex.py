"""The parts of the CUDA path with soft caps and sinks, on a CPU: FlexAttention runs there uncompiled, forward only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from posttrain_lib.ops.attention import DocumentLayout, packed_attention
from posttrain_lib.ops.attention_flex import attend_flex, block_mask, key_runs
from posttrain_lib.schema.shared_prefix import SharedPrefixes
from tests.oracles.prefix_tree import row_of, seen, tree_of

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def _boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@settings(max_examples=60, deadline=None)
@given(
    choices=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 7)), min_size=1, max_size=9),
    window=st.sampled_from([None, 1, 2, 5, 9, 100]),
)
def test_a_query_sees_one_run_of_keys(choices, window):
    tree = tree_of(choices)
    cu_seqlens, positions, parents = row_of(tree)
    paths = SharedPrefixes.of(cu_seqlens, positions, parents)
    index = torch.as_tensor(paths.key_index)
    first, last = key_runs(cu_seqlens, torch.as_tensor(paths.cu_seqlens_k), len(positions), window)
    table = seen(tree, window)
    for row, begin, end in zip(table, first.tolist(), last.tolist(), strict=True):
        assert index[begin : end + 1].sort().values.tolist() == row.nonzero().squeeze(1).tolist()
    assert bool((first.diff() >= 0).all() and (last.diff() > 0).all())  # what the tiles are computed from


@settings(max_examples=20, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 400)), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 100, 128, 129, 300]),
)
def test_the_tiles_are_those_found_by_looking_at_every_pair(segments, window):
    cu_q = _boundaries([own for _, own in segments])
    cu_k = _boundaries([context + own for context, own in segments])
    queries, keys = int(cu_q[-1]), int(cu_k[-1])
    tiles = block_mask(cu_q, cu_k, queries, keys, window)
    looked = create_block_mask(tiles.mask_mod, 1, 1, queries, keys, device="cpu")
    assert tiles.shape == looked.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(tiles, f"{name}_num_blocks")
        assert torch.equal(counts, getattr(looked, f"{name}_num_blocks")), name
        found, expected = getattr(tiles, f"{name}_indices"), getattr(looked, f"{name}_indices")
        for row, count in enumerate(counts[0, 0].tolist()):  # what stands behind the count means nothing
            assert torch.equal(found[0, 0, row, :count], expected[0, 0, row, :count]), name


@pytest.mark.parametrize(("softcap", "sinks"), [(None, True), (1.5, False), (1.5, True), (None, False)])
@pytest.mark.parametrize("window", [None, 3, 130])
def test_equals_the_path_of_a_cpu(softcap, sinks, window):
    tree = [(-1, 0, 200), (0, 130, 70), (0, 200, 1), (1, 199, 150), (-1, 0, 5)]
    cu_seqlens, positions, parents = row_of(tree)
    prefixes = SharedPrefixes.of(cu_seqlens, positions, parents).map(torch.as_tensor)
    layout = DocumentLayout.of(cu_seqlens, 200, prefixes=prefixes)
    tokens = len(positions)
    query, key, value = (torch.randn(tokens, *shape) for shape in ((4, 16), (2, 16), (2, 8)))
    options = {"scale": 0.4, "softcap": softcap, "sinks_N": torch.randn(4) if sinks else None}
    expected = packed_attention(query, key, value, layout, 200, window=window, **options)
    index = prefixes.key_index
    tiles = block_mask(cu_seqlens, layout.keys.cu_seqlens, tokens, len(index), window)
    found = attend_flex(query, key[index], value[index], tiles, attend=flex_attention, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32 sums of hundreds of numbers up to 4


def test_other_lengths_are_not_other_graphs():
    """One more graph each where a length is also a multiple of the tile and where there is one tile only."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    sinks = torch.randn(2)
    for lengths in ([300, 100], [260, 260, 1], [700], [5] * 80, [129, 127, 300], [31] * 17):
        cu_seqlens, tokens = _boundaries(lengths), sum(lengths)
        rows = [torch.randn(tokens, heads, 8) for heads in (2, 1, 1)]
        tiles = block_mask(cu_seqlens, cu_seqlens, tokens, tokens, 64)
        attend_flex(*rows, tiles, scale=0.4, softcap=2.0, sinks_N=sinks, attend=compiled)
    assert counter.frame_count <= 3
