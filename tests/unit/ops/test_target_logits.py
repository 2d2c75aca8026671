from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.ops.head_reference import target_logits_reference
from posttrain_lib.ops.target_logits import target_logits
from tests.unit.ops.head_cases import (
    EVERYTHING,
    TOKENS,
    VOCAB,
    LargestTensor,
    any_options,
    assert_all_close,
    assert_near_in,
    make_case,
)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, TOKENS), options=any_options, seed=st.integers(0, 50))
def test_equals_the_dense_reference_in_value_and_gradient(count, options, seed):
    case = make_case(count, options, seed=seed)
    pull = torch.randn(count, dtype=torch.float64)
    results = []
    for function in (target_logits, target_logits_reference):
        logits = function(case.hidden, case.head, case.targets, case.index)
        results.append([logits, *torch.autograd.grad((logits * pull).sum(), case.inputs())])
    # float64 sums of a dozen terms
    assert_all_close(*results, 1e-12)


def test_half_precision_is_summed_in_float32_under_autocast_too():
    case = make_case(20, EVERYTHING).to(torch.bfloat16)
    wide = case.to(torch.float64)
    expected = target_logits_reference(wide.hidden, wide.head, wide.targets, wide.index)
    with torch.autocast("cpu", torch.bfloat16):
        found = target_logits(case.hidden, case.head, case.targets, case.index)
    assert found.dtype == torch.float32
    # the inputs are the same numbers: nothing is rounded but float32's sums
    assert_near_in(torch.float32, [found.detach()], [expected.detach()])
    gradients = torch.autograd.grad(found.sum(), case.inputs())
    assert_near_in(torch.bfloat16, list(gradients), list(torch.autograd.grad(expected.sum(), wide.inputs())))


def test_no_row_of_logits_exists():
    case = make_case(TOKENS, size=8)
    with LargestTensor() as seen:
        target_logits(case.hidden, case.head, case.targets, case.index).sum().backward()
    assert seen.largest <= VOCAB * 8
