from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.ops import head_chunks
from posttrain_lib.ops.head_reference import linear_regularised_cross_entropy_reference, token_logprobs_reference
from posttrain_lib.ops.head_regularised import linear_regularised_cross_entropy
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy
from tests.unit.ops.head_cases import (
    EVERYTHING,
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
ALL = {"label_smoothing": 0.2, "z_loss": 0.03, "entropy_bonus": 0.4}


def regularised(case: Case, **options):
    arguments = (case.hidden, case.head, case.targets, case.loss_weights, case.index)
    return linear_regularised_cross_entropy(*arguments, **options)


def reference(case: Case, **options):
    arguments = (case.hidden, case.head, case.targets, case.loss_weights, case.index)
    return linear_regularised_cross_entropy_reference(*arguments, **options)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, TOKENS),
    chunk=st.sampled_from([1, 7, 1000, None]),
    options=any_options,
    label_smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 0.03]),
    entropy_bonus=st.sampled_from([0.0, 0.4]),
)
def test_equals_the_dense_reference_in_value_and_gradient(
    count, chunk, options, label_smoothing, z_loss, entropy_bonus
):
    case = make_case(count, options)
    terms = {"label_smoothing": label_smoothing, "z_loss": z_loss, "entropy_bonus": entropy_bonus}
    *found, parts = regularised(case, chunk_tokens=chunk, **terms)
    expected = value_and_gradients(reference(case, **terms), case.inputs())
    assert_all_close(value_and_gradients(tuple(found), case.inputs()), expected, EXACT)
    logprobs, entropy = token_logprobs_reference(case.hidden, case.head, case.targets, case.index)
    assert set(parts) == ({"nll", "log_z", "entropy"} if entropy_bonus else {"nll", "log_z"})
    assert_all_close([parts["nll"]], [-logprobs.detach()], EXACT)
    if entropy_bonus:
        assert_all_close([parts["entropy"]], [entropy.detach()], EXACT)


def test_without_any_term_it_is_the_plain_loss():
    case = make_case(20, EVERYTHING)
    plain = linear_cross_entropy(case.hidden, case.head, case.targets, case.loss_weights, case.index, chunk_tokens=7)
    *found, _ = regularised(case, chunk_tokens=7)
    expected = value_and_gradients(plain, case.inputs())
    assert_all_close(value_and_gradients(tuple(found), case.inputs()), expected, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near(dtype, monkeypatch):
    # two rows in a block, so that a chunk has several
    monkeypatch.setattr(head_chunks, "_BLOCK_BYTES", {"cpu": 4 * VOCAB * 2})
    case = make_case(20, Options(padded=True, softcap=2.5)).to(dtype)
    wide = case.to(torch.float64)
    *found, _ = regularised(case, chunk_tokens=6, **ALL)
    assert found[0].dtype == found[1].dtype == torch.float32
    expected = value_and_gradients(reference(wide, **ALL), wide.inputs())
    assert_near_in(dtype, value_and_gradients(tuple(found), case.inputs()), expected)


def test_the_full_logits_never_exist_and_three_products_run():
    case = make_case(TOKENS)
    with LargestTensor() as seen:
        loss, _, _ = regularised(case, chunk_tokens=5, **ALL)
        loss.backward()
    assert seen.largest < TOKENS * VOCAB
    assert len(seen.products) == 3 * 5
