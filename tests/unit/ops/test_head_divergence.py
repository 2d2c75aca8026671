from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.ops import head_chunks
from posttrain_lib.ops.head_divergence import linear_divergence, linear_top_divergence
from posttrain_lib.ops.head_reference import (
    linear_divergence_reference,
    linear_top_divergence_reference,
    log_probabilities,
)
from posttrain_lib.ops.head_topk import top_logprobs
from posttrain_lib.ops.output_head import OutputHead
from tests.unit.ops.head_cases import (
    EVERYTHING,
    REAL,
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

EXACT = 1e-11  # float64 sums of some hundred terms
DIVERGENCES = ("forward", "reverse", "symmetric", "jensen_shannon")
TEACHER_HIDDEN = 7


def cases(count: int, options: Options, seed: int = 0) -> tuple[Case, Case]:
    """A student and a teacher of another width, a soft cap of its own and the same vocabulary."""
    teacher = make_case(count, Options(padded=options.padded, softcap=4.0), size=TEACHER_HIDDEN, seed=seed + 1000)
    return make_case(count, options, seed=seed), teacher


def both(student: Case, teacher: Case) -> tuple:
    return student.hidden, student.head, teacher.hidden, teacher.head, student.loss_weights, student.index


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, TOKENS),
    chunk=st.sampled_from([1, 7, None]),
    options=any_options,
    divergence=st.sampled_from(DIVERGENCES),
    mix=st.sampled_from([0.5, 0.1]),
    temperature=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 20),
)
def test_equals_the_dense_reference(count, chunk, options, divergence, mix, temperature, seed):
    student, teacher = cases(count, options, seed)
    settings = {"divergence": divergence, "mix": mix, "temperature": temperature}
    found = linear_divergence(*both(student, teacher), **settings, chunk_tokens=chunk)
    expected = linear_divergence_reference(*both(student, teacher), **settings)
    assert_all_close(
        value_and_gradients(found, student.inputs()), value_and_gradients(expected, student.inputs()), EXACT
    )


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, TOKENS),
    kept=st.sampled_from([1, 5, REAL]),
    chunk=st.sampled_from([1, 7, None]),
    options=any_options,
    temperature=st.sampled_from([1.0, 2.0]),
)
def test_kept_logprobs_equal_the_dense_reference(count, kept, chunk, options, temperature):
    student, teacher = cases(count, dataclasses.replace(options, padded=True))
    logprobs, ids = top_logprobs(teacher.hidden, teacher.head, torch.arange(TOKENS), kept)
    at = student.index
    inputs = (student.hidden, student.head, ids[at], logprobs[at], student.loss_weights, at)
    found = linear_top_divergence(*inputs, chunk_tokens=chunk, temperature=temperature)
    if kept == REAL:
        # nothing is left over: the divergence is the full one. (The reference, which takes the rest from a sum of
        # almost 1, has nothing but rounding there.)
        log_q = log_probabilities(student.hidden, student.head, temperature)[student.index]
        log_p = log_probabilities(teacher.hidden, teacher.head)[student.index].detach()
        values = (log_p.exp() * (log_p - log_q)).sum(-1)
        expected = ((values * student.loss_weights[student.index]).sum(), values.detach())
    else:
        expected = linear_top_divergence_reference(*inputs, temperature=temperature)
    # the reference's rest, as above, has lost some digits
    assert_all_close(
        value_and_gradients(found, student.inputs()), value_and_gradients(expected, student.inputs()), 1e3 * EXACT
    )


def test_kept_logprobs_never_say_more_than_all():
    student, teacher = cases(TOKENS, EVERYTHING)
    _, full = linear_divergence(*both(student, teacher))
    before = torch.zeros_like(full)
    for kept in (1, 3, 10, REAL):
        logprobs, ids = top_logprobs(teacher.hidden, teacher.head, torch.arange(TOKENS), kept)
        _, found = linear_top_divergence(
            student.hidden,
            student.head,
            ids[student.index],
            logprobs[student.index],
            student.loss_weights,
            student.index,
        )
        assert (found >= before - EXACT).all()
        assert (found <= full + EXACT).all()
        before = found
    torch.testing.assert_close(before, full, rtol=0, atol=EXACT)


def test_a_student_that_left_the_rest_nothing_stays_finite():
    """Every number in the rest underflows: the loss is large and its gradient pulls the kept tokens down."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[500.0], [0.0], [0.0]], requires_grad=True)
    loss, _ = linear_top_divergence(
        hidden,
        OutputHead(weight),
        torch.tensor([[0]]),
        torch.tensor([[0.5]]).log(),
        torch.ones(1),
        torch.arange(1),
    )
    loss.backward()
    assert 30 < float(loss.detach()) < 60
    assert float(weight.grad[0]) == pytest.approx(0.5)
    assert weight.grad.isfinite().all()
    assert hidden.grad.isfinite().all()


def test_logprobs_of_minus_infinity_and_sums_above_one_are_taken():
    """float16 storage rounds a sum to a little above 1; a teacher with a mask gives -inf."""
    student, _ = cases(TOKENS, Options())
    ids = torch.arange(3).expand(len(student.index), 3)
    logprobs = torch.tensor([0.7, 0.3004, 0.0]).log().expand(len(student.index), 3)
    found = linear_top_divergence(student.hidden, student.head, ids, logprobs, student.loss_weights, student.index)
    assert all(tensor.isfinite().all() for tensor in value_and_gradients(found, student.inputs()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_divergence_from_itself(divergence):
    student = make_case(TOKENS, EVERYTHING)
    found = linear_divergence(*both(student, student), divergence=divergence)
    for tensor in value_and_gradients(found, student.inputs()):
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=EXACT)


def test_the_teacher_gets_no_gradient_and_padding_may_differ():
    student, teacher = cases(TOKENS, Options(padded=True))
    more = torch.cat([teacher.head.weight_VD.detach(), torch.full((9, TEACHER_HIDDEN), 100.0, dtype=torch.float64)])
    wider = dataclasses.replace(teacher, head=OutputHead(more.requires_grad_(), vocab_size=REAL, softcap=4.0))
    loss, _ = linear_divergence(*both(student, wider))
    torch.testing.assert_close(loss, linear_divergence(*both(student, teacher))[0], rtol=0, atol=EXACT)
    loss.backward()
    assert wider.hidden.grad is None
    assert more.grad is None
    assert student.head.weight_VD.grad[:REAL].any()
    assert not student.head.weight_VD.grad[REAL:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("half_products", [False, True])
def test_lower_precision_stays_near(dtype, divergence, half_products, monkeypatch):
    monkeypatch.setattr(head_chunks, "cpu_has_products_in", lambda _: half_products)
    monkeypatch.setattr(head_chunks, "_BLOCK_BYTES", {"cpu": 4 * VOCAB * 2})  # several blocks in a chunk
    student, teacher = (case.to(dtype) for case in cases(TOKENS, Options(padded=True)))
    found = linear_divergence(*both(student, teacher), divergence=divergence, chunk_tokens=6)
    assert found[0].dtype == torch.float32
    wide = [case.to(torch.float64) for case in (student, teacher)]
    expected = linear_divergence_reference(*both(*wide), divergence=divergence)
    assert_near_in(dtype, value_and_gradients(found, student.inputs()), value_and_gradients(expected, wide[0].inputs()))


def test_the_full_logits_never_exist():
    tokens, vocab, chunk, size = 256, 500, 16, 8
    hidden, other = torch.randn(tokens, size, requires_grad=True), torch.randn(tokens, size)
    head, teacher = OutputHead(torch.randn(vocab, size, requires_grad=True)), OutputHead(torch.randn(vocab, size))
    everywhere, weights = torch.arange(tokens), torch.ones(tokens)
    with LargestTensor() as seen:
        for divergence in DIVERGENCES:
            linear_divergence(
                hidden, head, other, teacher, weights, everywhere, divergence=divergence, chunk_tokens=chunk
            )[0].backward()
        logprobs, ids = top_logprobs(other, teacher, everywhere, 4, chunk_tokens=chunk)
        linear_top_divergence(hidden, head, ids, logprobs, weights, everywhere, chunk_tokens=chunk)[0].backward()
    assert chunk * vocab <= seen.largest <= max(chunk * vocab, vocab * size)


def test_what_cannot_be_compared_is_refused():
    student, teacher = cases(3, Options())
    inputs = both(student, teacher)
    smaller = dataclasses.replace(teacher, head=OutputHead(teacher.head.weight_VD, vocab_size=REAL))
    with pytest.raises(ModelError, match=f"different vocabularies[\\s\\S]*{VOCAB} and {REAL} entries"):
        linear_divergence(*both(student, smaller))
    with pytest.raises(ModelError, match="different positions"):
        linear_divergence(*inputs[:2], teacher.hidden[:4], *inputs[3:])
    with pytest.raises(ConfigError, match="unknown divergence"):
        linear_divergence(*inputs, divergence="sideways")
    with pytest.raises(ConfigError, match="mix"):
        linear_divergence(*inputs, mix=1.0)
    ids = torch.zeros(TOKENS, 2, dtype=torch.int64)
    with pytest.raises(ConfigError, match="shape"):
        linear_top_divergence(
            student.hidden, student.head, ids, torch.zeros(TOKENS, 3), student.loss_weights, student.index
        )
