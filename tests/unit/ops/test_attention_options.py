"""Soft caps, sinks and values of another width, alone and together, against the dense reference and transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain_lib.ops.attention import DocumentLayout, packed_attention
from posttrain_lib.ops.attention_pieces import QUERIES, attend_pieces, pieces
from posttrain_lib.ops.reference import packed_attention_reference
from posttrain_lib.schema.shared_prefix import SharedPrefixes
from tests.oracles.prefix_tree import TREE, documents, row_of, tree_of

# float64: 1e-15 per operation, hundreds of them at the longest, of numbers of size 1
EXACT = 1e-12
OPTIONS = pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, True), (1.5, False), (1.5, True)], ids=["sinks", "softcap", "both"]
)
lengths_strategy = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def _boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _inputs(tokens, heads=4, key_heads=2, width=8, value_width=8, sinks=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, key_heads, width), (tokens, key_heads, value_width), (heads,)]
    made = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return made if sinks else made[:3]


def _results(attend, inputs, *place, **options):
    """Output and the gradient of every input."""
    sinks = inputs[3] if len(inputs) == 4 else None
    output = attend(*inputs[:3], *place, scale=0.4, sinks_N=sinks, **options)
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output, *torch.autograd.grad(output, inputs, pull)]


def _largest_difference(some, others):
    return max(float((one - other).detach().abs().max()) for one, other in zip(some, others, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths_strategy,
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    window=st.sampled_from([None, 1, 2, 5, 100]),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    sinks=st.booleans(),
    value_width=st.sampled_from([3, 8, 11]),
)
def test_equals_the_dense_reference_in_value_and_gradient(lengths, heads, window, softcap, sinks, value_width):
    inputs = _inputs(sum(lengths), *heads, value_width=value_width, sinks=sinks)
    place = _boundaries(lengths), max(lengths)
    fast, dense = (
        _results(attend, inputs, *place, window=window, softcap=softcap)
        for attend in (packed_attention, packed_attention_reference)
    )
    assert fast[0].shape == (sum(lengths), heads[0], value_width)
    assert _largest_difference(fast, dense) <= EXACT


@OPTIONS
@pytest.mark.parametrize("window", [None, 3, QUERIES, QUERIES + 44])
def test_documents_longer_than_a_piece_of_queries(softcap, sinks, window):
    lengths = [1, QUERIES, 7, 2 * QUERIES + 9]
    inputs = _inputs(sum(lengths), 2, 1, value_width=4, sinks=sinks)
    place = _boundaries(lengths), max(lengths)
    fast, dense = (
        _results(attend, inputs, *place, window=window, softcap=softcap)
        for attend in (packed_attention, packed_attention_reference)
    )
    assert _largest_difference(fast, dense) <= EXACT


def _shared(inputs, tree, **options):
    """``packed_attention`` over the tree, and the same from each document alone through the reference."""
    cu_seqlens, positions, parents = row_of(tree)
    prefixes = SharedPrefixes.of(cu_seqlens, positions, parents).map(torch.as_tensor)
    layout = DocumentLayout.of(cu_seqlens, int(cu_seqlens.diff().max()), prefixes=prefixes)

    def alone(query, key, value, **options):
        outputs = []
        for document, (_, cut, _) in zip(documents(tree), tree, strict=True):
            rows = (part[document] for part in (query, key, value))
            outputs.append(packed_attention_reference(*rows, _boundaries([len(document)]), 0, **options)[cut:])
        return torch.cat(outputs)

    return _results(packed_attention, inputs, layout, layout.max_seqlen, **options), _results(alone, inputs, **options)


@settings(max_examples=30, deadline=None)
@given(
    choices=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 7)), min_size=1, max_size=9),
    window=st.sampled_from([None, 1, 2, 5, 9]),
    option=st.sampled_from([(None, True), (1.5, False), (1.5, True)]),
    value_width=st.sampled_from([4, 8]),
)
def test_segments_that_share_a_beginning_equal_their_documents_alone(choices, window, option, value_width):
    tree = tree_of(choices)
    inputs = _inputs(sum(length for _, _, length in tree), value_width=value_width, sinks=option[1])
    assert _largest_difference(*_shared(inputs, tree, window=window, softcap=option[0])) <= EXACT


@OPTIONS
def test_a_context_longer_than_a_piece_of_queries(softcap, sinks):
    tree = [(-1, 0, 300), (0, 200, 257), (1, 457, 256), (-1, 0, 5), (3, 5, 513)]
    inputs = _inputs(sum(length for _, _, length in tree), 2, 1, sinks=sinks)
    for window in (None, 300):
        assert _largest_difference(*_shared(inputs, tree, window=window, softcap=softcap)) <= EXACT


@OPTIONS
@settings(max_examples=15, deadline=None)
@given(lengths=lengths_strategy, window=st.sampled_from([None, 3]))
def test_packed_is_alone_bit_for_bit(softcap, sinks, lengths, window):
    inputs = [item.detach() for item in _inputs(sum(lengths), value_width=5, sinks=True, dtype=torch.float32)]
    options = {"scale": 0.3, "window": window, "softcap": softcap, "sinks_N": inputs[3] if sinks else None}
    packed = packed_attention(*inputs[:3], _boundaries(lengths), max(lengths), **options)
    start = 0
    for length in lengths:
        rows = (item[start : start + length] for item in inputs[:3])
        alone = packed_attention(*rows, _boundaries([length]), length, **options)
        assert torch.equal(packed[start : start + length], alone)
        start += length


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (None, True), (1.5, False), (1.5, True)])
def test_no_table_of_all_pairs_is_made_or_kept(softcap, sinks):
    """Also where values are narrower, for which the fused kernel alone would fall back to a table."""
    tokens, heads = 8 * QUERIES, 2
    inputs = _inputs(tokens, heads, heads, value_width=4, sinks=sinks, dtype=torch.float32)
    kept = []

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for item in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(item, torch.Tensor):
                    self.size = max(self.size, item.numel())
            return result

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _results(packed_attention, inputs, _boundaries([tokens]), tokens, softcap=softcap)
    assert largest.size <= heads * QUERIES * (tokens + 1)  # one piece's table; all pairs are eight times as many
    assert max(kept) <= tokens * heads * 8


def _as_hf(rows):
    return rows.transpose(0, 1)[None]


def _causal(tokens, dtype):
    return torch.full((tokens, tokens), float("-inf"), dtype=dtype).triu(1)[None, None]


def test_soft_caps_are_those_of_transformers_gemma2_and_as_fine_in_bfloat16():
    modeling = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    inputs = [item.detach().bfloat16() for item in _inputs(40, width=16, sinks=False, dtype=torch.float32)]

    def ours(query, key, value):
        return packed_attention(query, key, value, _boundaries([40]), 40, scale=0.5, softcap=2.0)

    def products(query, key, value):
        options = {"scale": 0.5, "window": None, "softcap": 2.0, "sinks_N": None}
        return attend_pieces(query, key, value, (40,), (40,), **options)

    def theirs(query, key, value):
        module = SimpleNamespace(num_key_value_groups=2, training=False)
        rows = _as_hf(query), _as_hf(key), _as_hf(value), _causal(40, query.dtype)
        return modeling.eager_attention_forward(module, *rows, scaling=0.5, softcap=2.0)[0][0]

    found = theirs(*inputs)
    # the same roundings; a sum in another order may round a product or the result to its neighbour, 2^-7 of numbers up
    # to 3 away
    torch.testing.assert_close(products(*inputs), found, rtol=0, atol=3 * 2.0**-7)
    exact = theirs(*(item.double() for item in inputs))
    # transformers' softmax is float32 also here: 2^-24 of numbers up to 3, some of them
    assert _largest_difference([ours(*(item.double() for item in inputs))], [exact]) <= 1e-6
    errors = [_largest_difference([result.double()], [exact]) for result in (ours(*inputs), products(*inputs), found)]
    assert errors[0] <= errors[2] and errors[1] <= 2 * errors[2]


def test_sinks_are_those_of_transformers_gpt_oss_and_finer_in_bfloat16():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    inputs = [item.detach().bfloat16() for item in _inputs(40, width=16, dtype=torch.float32)]

    def ours(query, key, value, sinks):
        return packed_attention(query, key, value, _boundaries([40]), 40, scale=0.5, sinks_N=sinks)

    def theirs(query, key, value, sinks):
        module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
        rows = _as_hf(query), _as_hf(key), _as_hf(value), _causal(40, query.dtype)
        return modeling.eager_attention_forward(module, *rows, scaling=0.5)[0][0]

    exact = theirs(*(item.double() for item in inputs))
    assert _largest_difference([ours(*(item.double() for item in inputs))], [exact]) <= EXACT
    errors = [_largest_difference([attend(*inputs).double()], [exact]) for attend in (ours, theirs)]
    assert errors[0] <= errors[1]


@OPTIONS
def test_autocast_computes_in_bfloat16_and_gives_gradients_in_the_inputs_dtype(softcap, sinks):
    inputs = _inputs(15, width=16, value_width=8, sinks=sinks, dtype=torch.float32)
    place = _boundaries([5, 9, 1]), 9
    exact = _results(packed_attention_reference, inputs, *place, softcap=softcap)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _results(packed_attention, inputs, *place, softcap=softcap)
    assert [item.dtype for item in found] == [torch.bfloat16, *(item.dtype for item in inputs)]
    for one, other in zip(found[:1], exact[:1], strict=True):
        # 8 bits of scores up to 5 and of values up to 3
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.06)


def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all():
    query, key, value = (item.detach() for item in _inputs(12, sinks=False))
    place = _boundaries([5, 7]), 7
    plain = packed_attention(query, key, value, *place, scale=0.4)
    none = torch.full((4,), float("-inf"), dtype=query.dtype)
    torch.testing.assert_close(
        packed_attention(query, key, value, *place, scale=0.4, sinks_N=none), plain, rtol=0, atol=EXACT
    )
    assert packed_attention(query, key, value, *place, scale=0.4, sinks_N=none.fill_(800.0)).abs().max() == 0.0


def test_segments_without_tokens_give_nothing():
    query, key, value, sinks = _inputs(5)
    for softcap, given_sinks in ((None, None), (None, sinks), (1.5, None)):
        options = {"scale": 0.4, "softcap": softcap, "sinks_N": given_sinks}
        found = packed_attention(query, key, value, _boundaries([0, 5, 0]), 5, **options)
        assert torch.equal(found, packed_attention(query, key, value, _boundaries([5]), 5, **options))
        none = packed_attention(query[:0], key[:0], value[:0], _boundaries([0]), 0, **options)
        assert none.shape == (0, 4, 8) and none.requires_grad


@settings(max_examples=80, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600)), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 50, 300]),
    longest=st.sampled_from([None, QUERIES]),
)
def test_pieces_cover_every_query_and_the_keys_it_sees(segments, window, longest):
    lengths, key_lengths = [own for _, own in segments], [context + own for context, own in segments]
    queries, starts = [], [sum(key_lengths[:number]) for number in range(len(segments))]
    expected = [
        (start + max(0, 0 if window is None else context + place + 1 - window), start + context + place)
        for start, (context, own) in zip(starts, segments, strict=True)
        for place in range(own)
    ]
    for piece in pieces(lengths, key_lengths, window, longest=longest):
        seen = piece.seen(window, torch.device("cpu"))
        assert len(seen) <= QUERIES or (piece.plain and longest is None)
        for row, place in zip(seen, range(piece.queries.start, piece.queries.stop), strict=True):
            first, last = expected[place]
            columns = row.nonzero().squeeze(1)
            assert (int(columns[0]) + piece.keys.start, int(columns[-1]) + piece.keys.start) == (first, last)
            assert len(columns) == last - first + 1
        queries.extend(range(piece.queries.start, piece.queries.stop))
    assert queries == list(range(sum(lengths)))


def test_the_tree_of_every_branch_with_every_option():
    for window in (None, 1, 4, 9):
        inputs = _inputs(sum(length for _, _, length in TREE), value_width=4)
        assert _largest_difference(*_shared(inputs, TREE, window=window, softcap=1.5)) <= EXACT
        assert _largest_difference(*_shared(inputs, TREE, window=window, softcap=None)) <= EXACT
