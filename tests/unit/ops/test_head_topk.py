from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.errors import ConfigError
from posttrain_lib.ops.head_reference import log_probabilities
from posttrain_lib.ops.head_topk import top_logprobs
from posttrain_lib.ops.output_head import OutputHead
from tests.unit.ops.head_cases import REAL, TOKENS, VOCAB, LargestTensor, any_options, make_case


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, TOKENS),
    k=st.sampled_from([1, 4, REAL]),
    chunk=st.sampled_from([1, 7, None]),
    options=any_options,
    temperature=st.sampled_from([1.0, 0.7]),
)
def test_equals_the_dense_reference(count, k, chunk, options, temperature):
    case = make_case(count, options)
    logprobs, ids = top_logprobs(case.hidden, case.head, case.index, k, temperature=temperature, chunk_tokens=chunk)
    expected = log_probabilities(case.hidden, case.head, temperature)[case.index].topk(k, dim=-1)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logprobs, expected.values.detach(), rtol=0, atol=1e-12)
    assert not logprobs.requires_grad


def test_half_precision_gives_float32_and_the_full_logits_never_exist():
    hidden, head = torch.randn(256, 8).bfloat16(), OutputHead(torch.randn(500, 8).bfloat16())
    with LargestTensor() as seen:
        logprobs, ids = top_logprobs(hidden, head, torch.arange(256), 4, chunk_tokens=16)
    assert seen.largest == 16 * 500
    assert (logprobs.dtype, ids.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("k", [0, VOCAB + 1])
def test_more_than_there_are_is_refused(k):
    case = make_case(2)
    with pytest.raises(ConfigError, match=f"1 to {VOCAB}"):
        top_logprobs(case.hidden, case.head, case.index, k)
