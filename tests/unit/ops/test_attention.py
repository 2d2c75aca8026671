from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.ops.attention import DocumentLayout, packed_attention
from posttrain_lib.ops.reference import packed_attention_reference


def _inputs(lengths, heads, key_heads, head_dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    shapes = [(tokens, heads, head_dim), (tokens, key_heads, head_dim), (tokens, key_heads, head_dim)]
    query, key, value = (torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return query, key, value, cu_seqlens


lengths_strategy = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_strategy,
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (6, 3)]),
    window=st.sampled_from([None, 1, 2, 5, 100]),
)
def test_equals_the_dense_reference_in_value_and_gradient(lengths, heads, window):
    inputs = _inputs(lengths, *heads, 4)
    pull = torch.randn_like(inputs[0])
    results = []
    for attend in (packed_attention, packed_attention_reference):
        output = attend(*inputs, max(lengths), scale=0.4, window=window)
        results.append([output, *torch.autograd.grad(output, inputs[:3], pull)])
    for fast, dense in zip(*results, strict=True):
        torch.testing.assert_close(fast, dense, rtol=0, atol=1e-12)  # float64: 1e-15 per operation, tens of them


@settings(max_examples=25, deadline=None)
@given(lengths=lengths_strategy, window=st.sampled_from([None, 3]))
def test_packed_is_alone_bit_for_bit(lengths, window):
    query, key, value, cu_seqlens = _inputs(lengths, 4, 2, 8, dtype=torch.float32)
    packed = packed_attention(query, key, value, cu_seqlens, max(lengths), scale=0.3, window=window)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        part = slice(start, end)
        ends = torch.tensor([0, end - start], dtype=torch.int32)
        alone = packed_attention(query[part], key[part], value[part], ends, end - start, scale=0.3, window=window)
        assert torch.equal(packed[part], alone)


def test_no_gradient_crosses_documents_or_time():
    query, key, value, cu_seqlens = _inputs([3, 4, 2], 2, 1, 4)
    output = packed_attention(query, key, value, cu_seqlens, 4, scale=0.5)
    grads = torch.autograd.grad(output[4].sum(), (query, key, value))  # second token of the second document
    for grad in grads:
        touched = grad.abs().sum((1, 2)).nonzero().squeeze(1).tolist()
        assert set(touched) <= {3, 4}


def test_a_layout_serves_as_well_as_the_boundaries():
    query, key, value, cu_seqlens = _inputs([3, 4], 2, 2, 4)
    layout = DocumentLayout.of(cu_seqlens, 4)
    assert layout.lengths == (3, 4)
    assert torch.equal(
        packed_attention(query, key, value, layout, 4, scale=1.0),
        packed_attention(query, key, value, cu_seqlens, 4, scale=1.0),
    )


def test_autocast_computes_in_bfloat16_near_the_exact_result():
    query, key, value, cu_seqlens = _inputs([5, 9, 1], 4, 2, 16, dtype=torch.float32)
    exact = packed_attention_reference(query, key, value, cu_seqlens, 9, scale=0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = packed_attention(query, key, value, cu_seqlens, 9, scale=0.25)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.04)  # bfloat16 keeps 8 bits of values up to 3


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 2, 7, 64])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_fused_varlen_equals_the_reference(window, heads):
    lengths = [1, 130, 17, 64, 300]
    inputs = _inputs(lengths, *heads, 64, dtype=torch.float32)
    half = [item.detach().cuda().bfloat16().requires_grad_() for item in inputs[:3]]
    exact = [item.detach().float().requires_grad_() for item in half]
    boundaries = inputs[3].cuda()
    pull = torch.randn_like(half[0])
    fused = packed_attention(*half, boundaries, max(lengths), scale=0.125, window=window)
    dense = packed_attention_reference(*exact, boundaries, max(lengths), scale=0.125, window=window)
    pairs = [(fused, dense)]
    pairs += zip(torch.autograd.grad(fused, half, pull), torch.autograd.grad(dense, exact, pull.float()), strict=True)
    for got, expected in pairs:
        # bfloat16 rounds each stored value by up to 2^-9 of it; sums of many are smaller than their largest term.
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=2**-6 * float(expected.detach().abs().max()))
