from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from posttrain_lib.errors import ModelError
from posttrain_lib.ops.head_reference import log_probabilities
from posttrain_lib.ops.output_head import HeadAdapter, OutputHead
from tests.unit.ops.head_cases import EVERYTHING, HIDDEN, REAL, VOCAB, Options, any_options, make_case


@given(options=any_options)
def test_logits_are_those_of_the_operations(options: Options) -> None:
    case = make_case(1, options)
    logits = case.head.logits(case.hidden)
    entries = case.head.entries
    assert logits.shape == (len(case.hidden), VOCAB)
    assert entries == (REAL if options.padded else VOCAB)
    assert torch.equal(logits[:, entries:], torch.full_like(logits[:, entries:], -torch.inf))
    expected = log_probabilities(case.hidden, case.head)
    torch.testing.assert_close(logits.log_softmax(-1)[:, :entries], expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected.exp().square().sum(), case.inputs())
    found = torch.autograd.grad(logits.softmax(-1).square().sum(), case.inputs())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_plain_head_is_the_bare_product() -> None:
    case = make_case(1)
    assert torch.equal(case.head.logits(case.hidden), torch.nn.functional.linear(case.hidden, case.head.weight_VD))


def test_autocast_decides_the_dtype() -> None:
    case = make_case(1, EVERYTHING).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert case.head.logits(case.hidden).dtype == torch.bfloat16


def weight() -> Tensor:
    return torch.zeros(VOCAB, HIDDEN)


@pytest.mark.parametrize("vocab_size", [0, -1, VOCAB + 1])
def test_a_vocabulary_that_does_not_fit_is_refused(vocab_size: int) -> None:
    with pytest.raises(ModelError, match=rf"vocab_size {vocab_size}\n.*1 to {VOCAB}"):
        OutputHead(weight(), vocab_size=vocab_size)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan")])
def test_a_softcap_that_is_none_is_refused(softcap: float) -> None:
    with pytest.raises(ModelError, match="softcap must be positive"):
        OutputHead(weight(), softcap=softcap)


@pytest.mark.parametrize(
    ("down", "up"), [((2, HIDDEN + 1), (VOCAB, 2)), ((2, HIDDEN), (VOCAB - 1, 2)), ((3, HIDDEN), (VOCAB, 2))]
)
def test_an_adapter_of_another_head_is_refused(down: tuple[int, int], up: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match=r"adapter does not fit its weight[\s\S]*down \(rank, 12\), up \(37, rank\)"):
        OutputHead(weight(), adapter=HeadAdapter(torch.zeros(down), torch.zeros(up), 1.0))
