from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy, token_logprobs
from posttrain_lib.ops.reference import linear_cross_entropy_reference, token_logprobs_reference

HIDDEN, VOCAB, TOKENS = 12, 37, 25


def _case(supervised, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(VOCAB - 4, (TOKENS,), generator=generator)
    index = torch.randperm(TOKENS, generator=generator)[:supervised].sort().values
    loss_weights = torch.zeros(TOKENS)
    loss_weights[index] = torch.rand(supervised, generator=generator) + 0.1
    return hidden, weight, targets, loss_weights.to(dtype), index


@settings(max_examples=40, deadline=None)
@given(
    supervised=st.integers(0, TOKENS),
    chunk=st.sampled_from([1, 7, 25, 1000, None]),
    vocab_size=st.sampled_from([None, VOCAB, VOCAB - 4]),
    seed=st.integers(0, 50),
)
def test_equals_the_dense_reference_in_value_and_gradient(supervised, chunk, vocab_size, seed):
    hidden, weight, *rest = _case(supervised, seed=seed)
    loss, nll = linear_cross_entropy(hidden, weight, *rest, chunk_tokens=chunk, vocab_size=vocab_size)
    fast = [loss, nll, *torch.autograd.grad(loss * 0.3, (hidden, weight))]
    loss, nll = linear_cross_entropy_reference(hidden, weight, *rest, vocab_size=vocab_size)
    dense = [loss, nll, *torch.autograd.grad(loss * 0.3, (hidden, weight))]
    for got, expected in zip(fast, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)  # float64 sums of some hundred terms


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, TOKENS),
    chunk=st.sampled_from([1, 7, None]),
    vocab_size=st.sampled_from([None, VOCAB - 4]),
    temperature=st.sampled_from([1.0, 0.7]),
    with_entropy=st.booleans(),
)
def test_logprobs_equal_the_dense_reference(count, chunk, vocab_size, temperature, with_entropy):
    hidden, weight, targets, _, index = _case(count)
    pulls = torch.randn(2, count, dtype=torch.float64)
    options = {"vocab_size": vocab_size, "temperature": temperature}
    logprobs, entropy = token_logprobs(
        hidden, weight, targets, index, chunk_tokens=chunk, with_entropy=with_entropy, **options
    )
    assert (entropy is not None) == with_entropy
    expected, expected_entropy = token_logprobs_reference(hidden, weight, targets, index, **options)
    results = []
    for values, entropies in ((logprobs, entropy), (expected, expected_entropy)):
        objective = (values * pulls[0]).sum()
        if with_entropy:
            objective = objective + (entropies * pulls[1]).sum()
        results.append([values, *torch.autograd.grad(objective, (hidden, weight))])
    if with_entropy:
        torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-11)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


def test_logprobs_gradcheck_in_float64():
    hidden, weight, targets, _, index = _case(6)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, index, chunk_tokens=4, with_entropy=True), (hidden, weight)
    )


def test_no_supervised_token_gives_a_zero_that_belongs_to_the_graph():
    hidden, weight, *rest = _case(0)
    loss, nll = linear_cross_entropy(hidden, weight, *rest)
    assert loss.item() == 0.0
    assert nll.shape == (0,)
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_that_are_not_supervised_do_not_matter():
    hidden, weight, targets, loss_weights, index = _case(5)
    broken = hidden.detach().clone()
    outside = torch.ones(TOKENS, dtype=torch.bool)
    outside[index] = False
    broken[outside] = float("nan")
    broken.requires_grad_()
    loss, _ = linear_cross_entropy(broken, weight, targets, loss_weights, index)
    expected, _ = linear_cross_entropy(hidden, weight, targets, loss_weights, index)
    assert torch.equal(loss, expected)
    loss.backward()
    assert torch.equal(broken.grad[outside], torch.zeros_like(broken.grad[outside]))


def test_a_padded_vocabulary_takes_no_probability():
    hidden, weight, targets, loss_weights, index = _case(8)
    padded = torch.cat([weight.detach(), torch.full((5, HIDDEN), 100.0, dtype=torch.float64)]).requires_grad_()
    loss, _ = linear_cross_entropy(hidden, padded, targets, loss_weights, index, vocab_size=VOCAB)
    expected, _ = linear_cross_entropy(hidden, weight, targets, loss_weights, index)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    loss.backward()
    assert torch.equal(padded.grad[VOCAB:], torch.zeros(5, HIDDEN, dtype=torch.float64))


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self.largest = max(self.largest, item.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_the_full_logits_never_exist(autocast):
    tokens, vocab, chunk, size = 256, 500, 16, 8
    hidden = torch.randn(tokens, size, requires_grad=True)
    weight = torch.randn(vocab, size, requires_grad=True)
    targets, everywhere = torch.randint(vocab, (tokens,)), torch.arange(tokens)
    with _LargestTensor() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = linear_cross_entropy(hidden, weight, targets, torch.ones(tokens), everywhere, chunk_tokens=chunk)
        loss.backward()
        token_logprobs(hidden, weight, targets, everywhere, chunk_tokens=chunk)[0].sum().backward()
    assert seen.largest <= max(chunk * vocab, vocab * size)
    assert seen.largest < tokens * vocab


def test_without_gradients_none_are_formed():
    hidden, weight, *rest = _case(10)
    expected, _ = linear_cross_entropy(hidden, weight, *rest)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, *rest)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    frozen, _ = linear_cross_entropy(hidden, weight.detach(), *rest)
    (grad,) = torch.autograd.grad(frozen, (hidden,))
    (whole,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, *rest)[0], (hidden,))
    assert torch.equal(grad, whole)


def test_a_second_backward_is_refused():
    hidden, weight, *rest = _case(3)
    loss, _ = linear_cross_entropy(hidden, weight, *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_autocast_products_in_bfloat16_sums_in_float32():
    hidden, weight, *rest = _case(20, dtype=torch.float32)
    exact = linear_cross_entropy(hidden, weight, *rest)[0]
    wanted = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, nll = linear_cross_entropy(hidden, weight, *rest, chunk_tokens=6)
    assert loss.dtype == nll.dtype == torch.float32
    # Logits of size 10 in bfloat16 are off by up to 0.03 each; 20 rows average that out in the sum.
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_a_vocabulary_beyond_the_head_is_refused():
    hidden, weight, *rest = _case(3)
    with pytest.raises(ValueError, match="vocab_size"):
        linear_cross_entropy(hidden, weight, *rest, vocab_size=VOCAB + 1)
