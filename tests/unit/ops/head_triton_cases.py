"""The head's Triton kernels on a CPU's tensors, under Triton's interpreter, against the dense reference in float64.

The interpreter must be chosen before Triton is imported: ``test_head_triton`` runs this file in a process of its own.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain_lib.ops import head_chunks, head_triton
from posttrain_lib.ops.head_reference import linear_cross_entropy_reference, token_logprobs_reference
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy, token_logprobs
from tests.unit.ops.head_cases import (
    EVERYTHING,
    HIDDEN,
    VOCAB,
    Case,
    LargestTensor,
    Options,
    assert_all_close,
    assert_near_in,
    make_case,
    value_and_gradients,
)

ROWS, COLUMNS, ENTRIES = 5, 41, 37
#: no soft cap; a scale of 0.6 and a temperature of 0.7; Gemma-2's shape
CURVES = [(None, 1.0), (None, 0.6 / 0.7), (0.6 / 2.5, 2.5 / 0.7)]
#: float32 logits up to some 20, off by half a unit of rounding each, and as much again from a few dozen terms' sum
FLOAT32 = 1e-5


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than one block, the last of them not full."""
    monkeypatch.setattr(head_triton, "BLOCK", 32)


def rows_of_logits(dtype: torch.dtype, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    """Products whose padding holds what must not be read, as a part of a wider buffer; targets."""
    generator = torch.Generator().manual_seed(1)
    buffer = torch.full((ROWS, COLUMNS + 7), math.nan)
    buffer[:, :ENTRIES] = torch.randn(ROWS, ENTRIES, generator=generator) * spread
    return buffer.to(dtype)[:, :COLUMNS], torch.tensor([0, 31, 32, 20, ENTRIES - 1])


def dense(products: Tensor, targets: Tensor, curve: tuple[float | None, float]) -> tuple[Tensor, ...]:
    """(products as a leaf, log-sum-exp, log-probability, entropy) in float64."""
    leaf = products.double()[:, :ENTRIES].clone().requires_grad_()
    inner, outer = curve
    logits = outer * (leaf if inner is None else torch.tanh(inner * leaf))
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(1, targets[:, None]).squeeze(1)
    return leaf, logits.logsumexp(-1), picked, -(logprobs.exp() * logprobs).sum(-1)


def slope(curve: tuple[float | None, float]) -> float:
    """The curve's at 0, which the kernels leave out of the gradient."""
    return curve[1] * (curve[0] or 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("lanes", "deep"), [(8, 1), (2, 4), (64, 4)])
def test_statistics_of_rows(dtype: torch.dtype, curve, lanes: int, deep: int, monkeypatch) -> None:
    monkeypatch.setattr(head_triton, "LANES", lanes)
    monkeypatch.setattr(head_triton, "DEEP", deep)
    products, targets = rows_of_logits(dtype)
    before = products.clone()
    found = head_triton.row_statistics(products, targets, ENTRIES, curve, with_entropy=True)
    assert_all_close(list(found), list(dense(products, targets, curve)[1:]), FLOAT32)
    assert torch.equal(products[:, :ENTRIES], before[:, :ENTRIES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("curve", CURVES)
def test_the_gradient_takes_the_products_place(dtype: torch.dtype, curve) -> None:
    products, targets = rows_of_logits(dtype)
    leaf, _, logprobs, _ = dense(products, targets, curve)
    (expected,) = torch.autograd.grad(-logprobs.sum(), leaf)
    _, found, entropy = head_triton.row_statistics(products, targets, ENTRIES, curve, with_gradient=True)
    torch.testing.assert_close(found.double(), logprobs, rtol=0, atol=FLOAT32)
    assert not entropy.any()
    # one rounding to the products' dtype of numbers up to 1
    bound = max(FLOAT32, torch.finfo(dtype).eps)
    torch.testing.assert_close(products[:, :ENTRIES].double() * slope(curve), expected, rtol=0, atol=bound)
    assert not products[:, ENTRIES:].any()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("curve", CURVES)
def test_gradients_that_come_from_outside(curve, with_entropy: bool) -> None:
    products, targets = rows_of_logits(torch.float32)
    leaf, log_totals, logprobs, entropy = dense(products, targets, curve)
    # every other one of a tensor, and, as the gradient of a sum comes, one number expanded
    pulls, entropy_pulls = torch.linspace(-1, 1, 2 * ROWS)[::2], torch.tensor(0.5).expand(ROWS)
    objective = (logprobs * pulls).sum() + ((entropy * entropy_pulls).sum() if with_entropy else 0)
    (expected,) = torch.autograd.grad(objective, leaf)
    of_entropy = (entropy.detach().float(), entropy_pulls) if with_entropy else ()
    head_triton.put_gradient(products, targets, ENTRIES, curve, log_totals.detach().float(), pulls, *of_entropy)
    torch.testing.assert_close(products[:, :ENTRIES].double() * slope(curve), expected, rtol=0, atol=FLOAT32)
    assert not products[:, ENTRIES:].any()


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_large_logits_neither_overflow_nor_vanish(offset: float) -> None:
    products = torch.full((1, COLUMNS), offset)
    products[0, 3] += 2
    targets = torch.tensor([3])
    expected = dense(products, targets, (None, 1.0))[1:]
    found = head_triton.row_statistics(products, targets, ENTRIES, (None, 1.0), with_entropy=True)
    # the log-sum-exp itself is as exact as float32 at its size
    torch.testing.assert_close(found[0].double(), expected[0], rtol=torch.finfo(torch.float32).eps, atol=0)
    assert_all_close(list(found[1:]), list(expected[1:]), FLOAT32)


@pytest.mark.parametrize("target", [-100, ENTRIES, COLUMNS + 1000])
def test_a_target_outside_of_the_vocabulary_shows(target: int) -> None:
    products, targets = rows_of_logits(torch.float32)
    targets[2] = target
    _, logprobs, _ = head_triton.row_statistics(products, targets, ENTRIES, (None, 1.0))
    assert logprobs.isnan().tolist() == [row == 2 for row in range(ROWS)]


def test_what_is_not_a_number_stays_visible() -> None:
    products, targets = rows_of_logits(torch.float32)
    products[1, 7], products[3, 30] = math.nan, math.inf
    results = head_triton.row_statistics(products, targets, ENTRIES, (None, 1.0), with_entropy=True)
    for result in results[1:]:
        assert result.isfinite().tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_scaling(source: torch.dtype, factor: float) -> None:
    tensor = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)).to(source)
    expected = (tensor.float() * factor).bfloat16()
    found = head_triton.scaled(tensor, torch.tensor(factor), torch.bfloat16)
    # the interpreter cuts off to bfloat16 where a GPU rounds: a unit, where it would be none
    torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    assert (found is tensor) == (source == torch.bfloat16)


@pytest.mark.parametrize("width", [1, 48, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_scaled_and_put_at_their_places(width: int, dtype: torch.dtype) -> None:
    rows, factors = torch.randn(3, width, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, -2.0, 0.0])
    expected = (rows * factors[:, None]).to(dtype)
    # as above, of the interpreter's rounding
    close = {"rtol": torch.finfo(dtype).eps, "atol": 0}
    found = head_triton.put_scaled_rows(rows, factors, torch.empty(3, width, dtype=dtype))
    torch.testing.assert_close(found, expected, **close)
    spread = torch.full((5, width), 7.0, dtype=dtype)
    head_triton.put_scaled_rows(rows, factors, spread, torch.tensor([4, 0, 2]))
    torch.testing.assert_close(spread[[4, 0, 2]], expected, **close)
    assert (spread[[1, 3]] == 7).all()
    assert head_triton.put_scaled_rows(rows[:0], factors[:0], spread) is spread


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations on a CPU's tensors take the way that they take on a GPU, products in half precision included."""
    monkeypatch.setattr(head_chunks, "has_kernels", lambda _: True)
    monkeypatch.setattr(head_chunks, "cpu_has_products_in", lambda _: True)


def both_ways(case: Case, dtype: torch.dtype, chunk_tokens: int | None, with_entropy: bool) -> None:
    """Cross-entropy, log-probs and entropies, values and gradients, against the reference on the same numbers."""
    case = case.to(dtype)
    wide = case.to(torch.float64)

    def cross_entropy(function, case: Case, **options) -> list[Tensor]:
        inputs = (case.hidden, case.head, case.targets, case.loss_weights, case.index)
        return value_and_gradients(function(*inputs, **options), case.inputs())

    found = cross_entropy(linear_cross_entropy, case, chunk_tokens=chunk_tokens)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 2 + [dtype] * len(case.inputs())
    assert_near_in(dtype, found, cross_entropy(linear_cross_entropy_reference, wide))

    pulls = torch.randn(2, len(case.index), generator=torch.Generator().manual_seed(2))
    results = []
    for function, one, options in (
        (token_logprobs, case, {"with_entropy": with_entropy, "chunk_tokens": chunk_tokens}),
        (token_logprobs_reference, wide, {}),
    ):
        logprobs, entropy = function(one.hidden, one.head, one.targets, one.index, temperature=0.7, **options)
        objective = (logprobs * pulls[0]).sum()
        values = [logprobs]
        if with_entropy:
            objective = objective + (entropy * pulls[1]).sum()
            values.append(entropy)
        results.append([*values, *torch.autograd.grad(objective, one.inputs())])
    assert_near_in(dtype, *results)


PLAIN, CAPPED = Options(), Options(padded=True, softcap=3.0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("dtype", "options", "chunk_tokens", "with_entropy"),
    [
        (torch.float32, PLAIN, 4, True),
        (torch.bfloat16, PLAIN, None, False),
        (torch.bfloat16, CAPPED, 4, True),
        (torch.float32, EVERYTHING, None, False),
        (torch.bfloat16, EVERYTHING, 4, True),
        (torch.float16, EVERYTHING, None, True),
    ],
)
def test_the_operations_equal_the_reference(
    dtype: torch.dtype, options: Options, chunk_tokens: int | None, with_entropy: bool
) -> None:
    both_ways(make_case(9, options), dtype, chunk_tokens, with_entropy)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(count: int) -> None:
    both_ways(make_case(count, EVERYTHING), torch.float32, None, with_entropy=True)


@pytest.mark.usefixtures("kernels")
def test_autocast_sums_in_float32() -> None:
    case = make_case(9, Options(softcap=3.0)).to(torch.float32)
    inputs = (case.hidden, case.head, case.targets, case.loss_weights, case.index)
    with torch.autocast("cpu", torch.bfloat16):
        results = linear_cross_entropy(*inputs)
    found = value_and_gradients(results, case.inputs())
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert_near_in(torch.bfloat16, found, value_and_gradients(linear_cross_entropy_reference(*inputs), case.inputs()))


class WideTensors(TorchDispatchMode):
    """Shapes of the float32 tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.usefixtures("kernels")
def test_one_chunk_writes_the_weights_gradient_in_its_own_dtype() -> None:
    """And several add up to the same, but for the rounding of each to bfloat16 that a CPU's products bring."""
    case = make_case(9).to(torch.bfloat16)
    gradients = []
    for chunk_tokens in (None, 5):
        with WideTensors() as seen:
            loss, _ = linear_cross_entropy(
                case.hidden, case.head, case.targets, case.loss_weights, case.index, chunk_tokens=chunk_tokens
            )
            gradients.append(torch.autograd.grad(loss, case.head.weight_VD)[0])
        assert ((VOCAB, HIDDEN) in seen.shapes) == (chunk_tokens is not None)
    assert_near_in(torch.bfloat16, [gradients[0]], [gradients[1]])


@pytest.mark.usefixtures("kernels")
def test_only_what_is_asked_for_is_formed() -> None:
    case = make_case(9)
    frozen = dataclasses.replace(case.to(torch.float32).head, weight_VD=case.head.weight_VD.detach().float())
    hidden = case.hidden.detach().float().requires_grad_()
    with LargestTensor() as seen:
        loss, _ = linear_cross_entropy(hidden, frozen, case.targets, case.loss_weights.float(), case.index)
        loss.backward()
    assert seen.products == [(9, frozen.rows), (9, HIDDEN)]
    with torch.no_grad(), LargestTensor() as seen:
        linear_cross_entropy(hidden, frozen, case.targets, case.loss_weights.float(), case.index)
    assert seen.products == [(9, frozen.rows)]
