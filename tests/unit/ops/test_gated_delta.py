from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.errors import ConfigError
from posttrain_lib.ops.attention import DocumentLayout
from posttrain_lib.ops.gated_delta import gated_delta_rule
from posttrain_lib.ops.reference import gated_delta_rule_reference
from posttrain_lib.schema.shared_prefix import SharedPrefixes

HEADS, KEY, VALUE = 3, 4, 5
SCALE = KEY**-0.5
#: float64 rounds at 1e-16 of numbers up to about 10, sums have at most hundreds of terms, and the triangular systems
#: of these sizes multiply errors by less than a thousand
EXACT = {"rtol": 0, "atol": 1e-9}


def layout_of(lengths):
    return DocumentLayout.of(torch.tensor(np.append(0, np.cumsum(lengths)), dtype=torch.int32), max(lengths))


def inputs_of(lengths, dtype=torch.float64, seed=0, heads=HEADS, key=KEY, value=VALUE):
    """query, key, value, log decay, beta, initial state: all leaves."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [normal(tokens, heads, key), normal(tokens, heads, key), normal(tokens, heads, value)]
    inputs += [-normal(tokens, heads).abs(), normal(tokens, heads).sigmoid(), normal(len(lengths), heads, key, value)]
    return [item.to(dtype).requires_grad_() for item in inputs]


def with_gradients(outputs, inputs, seed=1):
    """Outputs followed by the gradients of a fixed random weighting of all of them."""
    generator = torch.Generator().manual_seed(seed)
    pulls = [torch.randn(item.shape, generator=generator, dtype=torch.float64).to(item.dtype) for item in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, pulls)]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=6),
    normalise=st.booleans(),
    stateful=st.booleans(),
    chunk=st.sampled_from([1, 4, 8]),
)
def test_equals_the_recurrence_in_value_and_gradient(lengths, normalise, stateful, chunk):
    *inputs, state = inputs_of(lengths)
    leaves = [*inputs, state] if stateful else inputs
    options = {"scale": SCALE, "normalise": normalise, "initial_state": state if stateful else None}
    found = with_gradients(gated_delta_rule(*inputs, layout_of(lengths), chunk=chunk, **options), leaves)
    expected = with_gradients(gated_delta_rule_reference(*inputs, lengths, **options), leaves)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=2, max_size=4))
def test_packed_is_alone_in_value_and_gradient(lengths):
    *inputs, _ = inputs_of(lengths)
    options = {"scale": SCALE, "normalise": True}
    output, state = gated_delta_rule(*inputs, layout_of(lengths), **options)
    pull = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs, pull)
    begin = 0
    for number, length in enumerate(lengths):
        here = slice(begin, begin + length)
        begin += length
        own = [item.detach()[here].requires_grad_() for item in inputs]
        alone, own_state = gated_delta_rule(*own, layout_of([length]), **options)
        torch.testing.assert_close(output[here], alone, **EXACT)
        torch.testing.assert_close(state[number], own_state[0], **EXACT)
        for packed, single in zip(gradients, torch.autograd.grad(alone, own, pull[here]), strict=True):
            torch.testing.assert_close(packed[here], single, **EXACT)


def test_a_neighbour_that_is_not_a_number_changes_nothing():
    lengths = [5, 70, 3]
    *inputs, _ = inputs_of(lengths)
    clean, _ = gated_delta_rule(*inputs, layout_of(lengths), scale=SCALE, normalise=True)
    with torch.no_grad():
        for item in inputs:
            item[5:75] = float("nan")
    output, state = gated_delta_rule(*inputs, layout_of(lengths), scale=SCALE, normalise=True)
    others = torch.cat((output[:5], output[75:]))
    assert torch.equal(others, torch.cat((clean[:5], clean[75:])))
    assert state[1].isnan().all()
    for gradient in torch.autograd.grad(others.sum(), inputs):
        assert not torch.cat((gradient[:5], gradient[75:])).isnan().any()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("normalise", [True, False])
def test_equals_transformers_per_document(length, normalise):
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    lengths = [17, length, 4]
    # Keys of length about 1, as the models have them: without that the recurrence grows without bound in float32.
    query, key, value, log_decay, beta, state = (
        item.detach() for item in inputs_of(lengths, torch.float32, heads=2, key=16, value=8)
    )
    key = key / key.norm(dim=-1, keepdim=True)
    inputs = (query, key, value, log_decay, beta)
    output, final = gated_delta_rule(
        *inputs, layout_of(lengths), scale=16**-0.5, normalise=normalise, initial_state=state
    )
    alone = [item[None, 17 : 17 + length] for item in inputs]
    options = {"initial_state": state[1:2], "output_final_state": True, "use_qk_l2norm_in_kernel": normalise}
    for rule in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        expected, expected_state = rule(*alone, **options)
        # float32 keeps 24 bits: 6e-8 of numbers up to 10, in sums of up to 64 terms that are solved for one another
        torch.testing.assert_close(output[17 : 17 + length], expected[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(final[1], expected_state[0], rtol=0, atol=2e-5)


def test_a_state_carried_over_is_the_whole():
    whole, first = [130, 3, 70], [65, 1, 69]
    *inputs, _ = inputs_of(whole)
    options = {"scale": SCALE, "normalise": True}
    output, final = gated_delta_rule(*inputs, layout_of(whole), **options)
    begins = np.append(0, np.cumsum(whole))[:-1]
    early = torch.tensor(np.concatenate([np.arange(b, b + n) for b, n in zip(begins, first, strict=True)]))
    late = torch.tensor(np.concatenate([np.arange(b + n, b + w) for b, n, w in zip(begins, first, whole, strict=True)]))
    head, state = gated_delta_rule(*(item[early] for item in inputs), layout_of(first), **options)
    rest = layout_of([w - n for w, n in zip(whole, first, strict=True)])
    tail, end = gated_delta_rule(*(item[late] for item in inputs), rest, initial_state=state, **options)
    for got, wanted in ((head, output[early]), (tail, output[late]), (end, final)):
        torch.testing.assert_close(got, wanted, **EXACT)


def test_decoding_token_after_token_is_the_whole():
    lengths = [9, 9, 9]
    *inputs, _ = inputs_of(lengths)
    output, final = gated_delta_rule(*inputs, layout_of(lengths), scale=SCALE, normalise=True)
    state = None
    for step in range(9):
        here = torch.tensor([step, 9 + step, 18 + step])
        out, state = gated_delta_rule(
            *(item[here] for item in inputs), layout_of([1, 1, 1]), scale=SCALE, normalise=True, initial_state=state
        )
        torch.testing.assert_close(out, output[here], **EXACT)
    torch.testing.assert_close(state, final, **EXACT)


def test_gradients_by_finite_differences():
    lengths = [5, 1, 3]
    inputs = inputs_of(lengths, heads=1, key=2, value=2)

    def rule(query, key, value, log_decay, beta, state):
        return gated_delta_rule(
            query, key, value, log_decay, beta, layout_of(lengths), scale=0.7, normalise=True,
            initial_state=state, chunk=2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(rule, inputs)


def test_strong_forgetting_overflows_nowhere():
    """exp(G[i] - G[j]) for j after i would be infinite at these decays."""
    lengths = [100]
    *inputs, _ = inputs_of(lengths, torch.float32)
    inputs[3] = torch.full((100, HEADS), -200.0, requires_grad=True)
    output, _ = gated_delta_rule(*inputs, layout_of(lengths), scale=SCALE, normalise=True)
    assert output.isfinite().all()
    assert all(item.isfinite().all() for item in torch.autograd.grad(output.sum(), inputs))


def test_bfloat16_and_autocast_keep_the_memory_in_float32():
    lengths = [40, 90]
    *inputs, _ = (item.detach() for item in inputs_of(lengths, torch.bfloat16))
    exact, exact_state = gated_delta_rule(
        *(item.double() for item in inputs), layout_of(lengths), scale=SCALE, normalise=True
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = gated_delta_rule(*inputs, layout_of(lengths), scale=SCALE, normalise=True)
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(state.double(), exact_state, rtol=0, atol=1e-5)  # products in bfloat16 would lose 1e-2
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-5)  # one rounding to 8 bits at the end


def test_documents_that_share_a_beginning_are_refused():
    bounds, positions = np.array([0, 3, 5], np.int32), np.array([0, 1, 2, 3, 4])
    prefixes = SharedPrefixes.of(bounds, positions, np.array([-1, 0], np.int32)).map(torch.from_numpy)
    layout = DocumentLayout.of(torch.from_numpy(bounds), 3, prefixes=prefixes)
    *inputs, _ = inputs_of([3, 2])
    with pytest.raises(ConfigError, match="share_prefixes: false"):
        gated_delta_rule(*inputs, layout, scale=SCALE, normalise=True)
