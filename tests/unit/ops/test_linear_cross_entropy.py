from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.ops import head_chunks
from posttrain_lib.ops.head_reference import linear_cross_entropy_reference, token_logprobs_reference
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy, token_logprobs
from posttrain_lib.ops.output_head import OutputHead
from tests.unit.ops.head_cases import (
    EVERYTHING,
    HIDDEN,
    TOKENS,
    VOCAB,
    Case,
    LargestTensor,
    Options,
    any_options,
    assert_all_close,
    assert_near_in,
    make_case,
    value_and_gradients,
)

#: float64 sums of some hundred terms
EXACT = 1e-11


def cross_entropy(case: Case, **options):
    return linear_cross_entropy(case.hidden, case.head, case.targets, case.loss_weights, case.index, **options)


def cross_entropy_reference(case: Case):
    return linear_cross_entropy_reference(case.hidden, case.head, case.targets, case.loss_weights, case.index)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, TOKENS),
    chunk=st.sampled_from([1, 7, 25, 1000, None]),
    options=any_options,
    seed=st.integers(0, 50),
)
def test_equals_the_dense_reference_in_value_and_gradient(count, chunk, options, seed):
    case = make_case(count, options, seed=seed)
    found = value_and_gradients(cross_entropy(case, chunk_tokens=chunk), case.inputs())
    assert_all_close(found, value_and_gradients(cross_entropy_reference(case), case.inputs()), EXACT)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, TOKENS),
    chunk=st.sampled_from([1, 7, None]),
    options=any_options,
    temperature=st.sampled_from([1.0, 0.7]),
    with_entropy=st.booleans(),
)
def test_logprobs_equal_the_dense_reference(count, chunk, options, temperature, with_entropy):
    case = make_case(count, options)
    pulls = torch.randn(2, count, dtype=torch.float64)
    logprobs, entropy = token_logprobs(
        case.hidden,
        case.head,
        case.targets,
        case.index,
        chunk_tokens=chunk,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    assert (entropy is not None) == with_entropy
    expected, expected_entropy = token_logprobs_reference(
        case.hidden, case.head, case.targets, case.index, temperature=temperature
    )
    results = []
    for values, entropies in ((logprobs, entropy), (expected, expected_entropy)):
        objective = (values * pulls[0]).sum()
        if with_entropy:
            objective = objective + (entropies * pulls[1]).sum()
        results.append([values, *torch.autograd.grad(objective, case.inputs())])
    if with_entropy:
        torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=EXACT)
    assert_all_close(*results, EXACT)


def test_logprobs_gradcheck_in_float64():
    case = make_case(6, EVERYTHING)

    def logprobs(hidden, weight, down, up):
        adapter = dataclasses.replace(case.head.adapter, down_RD=down, up_VR=up)
        head = dataclasses.replace(case.head, weight_VD=weight, adapter=adapter)
        return token_logprobs(hidden, head, case.targets, case.index, chunk_tokens=4, with_entropy=True)

    assert torch.autograd.gradcheck(logprobs, case.inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [Options(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("half_products", [False, True])
def test_lower_precision_stays_near(dtype, options, half_products, monkeypatch):
    """Both ways that a CPU may take: products in half precision, and in float32 from half-precision inputs."""
    monkeypatch.setattr(head_chunks, "cpu_has_products_in", lambda _: half_products)
    # a tile smaller than the vocabulary, so that the weight is widened in several
    monkeypatch.setattr(head_chunks, "_TILE_BYTES", 4 * HIDDEN * 10)
    # two rows in a block, so that a chunk has several
    monkeypatch.setattr(head_chunks, "_BLOCK_BYTES", {"cpu": 4 * VOCAB * 2})
    case = make_case(20, options).to(dtype)
    wide = case.to(torch.float64)
    loss, nll = cross_entropy(case, chunk_tokens=6)
    assert loss.dtype == nll.dtype == torch.float32
    found = value_and_gradients((loss, nll), case.inputs())
    assert [gradient.dtype for gradient in found[2:]] == [dtype] * len(case.inputs())
    expected = value_and_gradients(cross_entropy_reference(wide), wide.inputs())
    assert_near_in(dtype, found, expected)
    logprobs, entropy = token_logprobs(case.hidden, case.head, case.targets, case.index, with_entropy=True)
    found = [logprobs, entropy, *torch.autograd.grad((logprobs + entropy).sum(), case.inputs())]
    logprobs, entropy = token_logprobs_reference(wide.hidden, wide.head, wide.targets, wide.index)
    expected = [logprobs, entropy, *torch.autograd.grad((logprobs + entropy).sum(), wide.inputs())]
    assert_near_in(dtype, found, expected)


def test_no_supervised_token_gives_a_zero_that_belongs_to_the_graph():
    case = make_case(0, EVERYTHING)
    loss, nll = cross_entropy(case)
    assert loss.item() == 0.0
    assert nll.shape == (0,)
    loss.backward()
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in case.inputs())


def test_rows_that_are_not_supervised_do_not_matter():
    case = make_case(5)
    broken = case.hidden.detach().clone()
    outside = torch.ones(TOKENS, dtype=torch.bool)
    outside[case.index] = False
    broken[outside] = float("nan")
    broken.requires_grad_()
    loss, _ = cross_entropy(dataclasses.replace(case, hidden=broken))
    assert torch.equal(loss, cross_entropy(case)[0])
    loss.backward()
    assert torch.equal(broken.grad[outside], torch.zeros_like(broken.grad[outside]))


def test_a_padded_vocabulary_takes_no_probability():
    case = make_case(8)
    weight = torch.cat([case.head.weight_VD.detach(), torch.full((5, HIDDEN), 100.0, dtype=torch.float64)])
    weight.requires_grad_()
    loss, _ = cross_entropy(dataclasses.replace(case, head=OutputHead(weight, vocab_size=VOCAB)))
    torch.testing.assert_close(loss, cross_entropy(case)[0], rtol=0, atol=1e-12)
    loss.backward()
    assert torch.equal(weight.grad[VOCAB:], torch.zeros(5, HIDDEN, dtype=torch.float64))
    assert weight.grad[:VOCAB].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_full_logits_never_exist(autocast):
    tokens, vocab, chunk, size = 256, 500, 16, 8
    hidden = torch.randn(tokens, size, requires_grad=True)
    head = OutputHead(torch.randn(vocab, size, requires_grad=True), softcap=5.0)
    targets, everywhere = torch.randint(vocab, (tokens,)), torch.arange(tokens)
    with LargestTensor() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = linear_cross_entropy(hidden, head, targets, torch.ones(tokens), everywhere, chunk_tokens=chunk)
        loss.backward()
        logprobs, entropy = token_logprobs(hidden, head, targets, everywhere, chunk_tokens=chunk, with_entropy=True)
        (logprobs + entropy).sum().backward()
    assert chunk * vocab <= seen.largest <= max(chunk * vocab, vocab * size)
    assert seen.largest < tokens * vocab


@pytest.mark.parametrize("operation", ["sum", "logprobs"])
def test_without_gradients_none_are_formed(operation):
    case = make_case(10, EVERYTHING)

    def run(case: Case) -> torch.Tensor:
        if operation == "sum":
            return cross_entropy(case)[0]
        return token_logprobs(case.hidden, case.head, case.targets, case.index)[0].sum()

    expected = run(case)
    whole = torch.autograd.grad(expected, case.inputs())
    with torch.no_grad():
        loss = run(case)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    for position, name in enumerate(("hidden", "weight", "down", "up")):
        # all but one frozen: its gradient is the same, and no other product runs
        frozen = case.to(torch.float64)
        for other, tensor in enumerate(frozen.inputs()):
            tensor.requires_grad_(other == position)
        with LargestTensor() as seen:
            (grad,) = torch.autograd.grad(run(frozen), [frozen.inputs()[position]])
        assert torch.equal(grad, whole[position]), name
        assert ((VOCAB, HIDDEN) in seen.products) == (name == "weight")


def test_a_tied_head_adds_its_gradient_to_the_embedding():
    case = make_case(9)
    embedding = case.head.weight_VD.detach().clone().requires_grad_()
    ids = torch.randint(VOCAB, (TOKENS,))
    gradients = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        hidden = embedding[ids] * 1.5
        loss, _ = function(hidden, OutputHead(embedding), case.targets, case.loss_weights, case.index)
        gradients.append(torch.autograd.grad(loss, embedding)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=EXACT)


def test_three_products_and_no_more():
    case = make_case(20)
    with LargestTensor() as seen:
        cross_entropy(case)[0].backward()
    assert seen.products == [(20, VOCAB), (20, HIDDEN), (VOCAB, HIDDEN)]


def test_a_second_backward_is_refused():
    loss, _ = cross_entropy(make_case(3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("half_products", [False, True])
def test_autocast_keeps_sums_and_gradients_in_float32(half_products, monkeypatch):
    monkeypatch.setattr(head_chunks, "cpu_has_products_in", lambda _: half_products)
    case = make_case(20).to(torch.float32)
    expected = value_and_gradients(cross_entropy(case), case.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = cross_entropy(case, chunk_tokens=6)
        logprobs, _ = token_logprobs(case.hidden, case.head, case.targets, case.index)
    found = value_and_gradients(results, case.inputs())
    assert all(tensor.dtype == torch.float32 for tensor in found)
    precision = torch.bfloat16 if half_products else torch.float32
    assert_near_in(precision, found, expected)
    # the backward of the log-probs runs outside of autocast, in the forward's dtype
    objective = -(logprobs * case.loss_weights[case.index]).sum() * 0.3
    assert_near_in(precision, list(torch.autograd.grad(objective, case.inputs())), expected[2:])
