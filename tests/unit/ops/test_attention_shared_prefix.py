"""Attention over segments that continue each other, against a table of all pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.ops.attention import DocumentLayout, packed_attention
from posttrain_lib.schema.shared_prefix import SharedPrefixes
from tests.oracles.prefix_tree import TREE, dense_attention, row_of, tree_of

# float64: 1e-15 per operation, tens of them, of numbers of size 1
EXACT = 1e-12
#: any numbers make a tree; see the oracle
choices = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 7)), min_size=1, max_size=9)


def _inputs(tree, heads=4, key_heads=2, head_dim=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(length for _, _, length in tree)
    shapes = [(tokens, count, head_dim) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def _layout(tree):
    cu_seqlens, positions, parents = row_of(tree)
    prefixes = SharedPrefixes.of(cu_seqlens, positions, parents).map(torch.as_tensor)
    return DocumentLayout.of(cu_seqlens, int(cu_seqlens.diff().max()), prefixes=prefixes)


def _results(output, inputs):
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output, *torch.autograd.grad(output, inputs, pull)]


def _largest_difference(layout, tree, inputs, window):
    """Over outputs and gradients, of what the layout says from what the tree is."""
    fast = _results(packed_attention(*inputs, layout, layout.max_seqlen, scale=0.4, window=window), inputs)
    dense = _results(dense_attention(*inputs, tree, 0.4, window), inputs)
    return max(float((one - other).detach().abs().max()) for one, other in zip(fast, dense, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    choices=choices,
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    window=st.sampled_from([None, 1, 2, 5, 9, 100]),
)
def test_equals_the_table_of_all_pairs_in_value_and_gradient(choices, heads, window):
    tree = tree_of(choices)
    assert _largest_difference(_layout(tree), tree, _inputs(tree, *heads), window) <= EXACT


@pytest.mark.parametrize("window", [None, *range(1, 18)])
def test_every_window_of_a_deep_tree(window):
    assert _largest_difference(_layout(TREE), TREE, _inputs(TREE), window) <= EXACT


@pytest.mark.parametrize("window", [None, 3, 256, 300])
def test_segments_longer_than_a_piece_of_queries(window):
    tree = [(-1, 0, 300), (0, 200, 257), (1, 457, 256), (-1, 0, 5), (3, 5, 513)]
    assert _largest_difference(_layout(tree), tree, _inputs(tree, 2, 1), window) <= EXACT


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    ("segment", "wrong"),
    [
        (4, (1, 5, 6)),  # one token of the context too few
        (4, (1, 7, 6)),  # one too many
        (4, (2, 6, 6)),  # a sibling's path: the same length, another branch
        (7, (4, 3, 8)),  # another parent whose path begins with the same tokens: no difference at all
        (9, (2, 9, 2)),  # a path that ends elsewhere
        (8, (-1, 0, 1)),  # a document of its own
        (3, (2, 5, 2)),  # a document that sees another
    ],
)
def test_a_planted_leak_is_seen(segment, wrong, window):
    planted = list(TREE)
    planted[segment] = wrong
    difference = _largest_difference(_layout(planted), TREE, _inputs(TREE), window)
    if segment == 7:
        assert difference <= EXACT
    else:
        assert difference > 1e-3  # nine orders above what the tests allow


def test_a_row_of_roots_takes_the_path_of_whole_documents():
    tree = [(-1, 0, 3), (-1, 0, 5)]
    layout = _layout(tree)
    assert layout == DocumentLayout(layout.cu_seqlens, 5, (3, 5), None)


def test_a_prompts_gradient_is_summed_in_float32():
    # 600 completions of one token: each gives the prompt's value half of its pull. In bfloat16 the sum of halves would
    # stop growing at 128, where a half is below its resolution.
    tree = [(-1, 0, 1), *[(0, 1, 1)] * 600]
    query, key, value = _inputs(tree, 1, 1, 8, dtype=torch.bfloat16)
    layout = _layout(tree)
    output = packed_attention(torch.zeros_like(query), key, value, layout, 1, scale=1.0)
    (found,) = torch.autograd.grad(output, value, torch.ones_like(output))
    assert (found[0].float() - 301).abs().max() <= 1  # the resolution at 301 is 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_its_dtype(dtype):
    inputs = _inputs(TREE, head_dim=16, dtype=torch.float32)
    layout = _layout(TREE)
    exact = dense_attention(*inputs, TREE, 0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = packed_attention(*inputs, layout, layout.max_seqlen, scale=0.25)
    assert output.dtype == dtype
    tolerance = 0.04 if dtype == torch.bfloat16 else 1e-5  # 8 and 24 bits of values up to 3
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=tolerance)
