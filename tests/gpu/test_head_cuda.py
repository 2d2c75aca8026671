"""The output head's kernels on a CUDA device: sizes that training has, memory, offsets, and no waiting host.

Needs PyTorch, Triton, numpy and pytest alone: a bare GPU machine runs it (``python infra/gpu_suite.py``). Small heads
with every option are in ``test_ops_cuda`` and, under Triton's interpreter, in ``tests/unit/ops/head_triton_cases.py``.

Tolerances. Rounding to bfloat16 moves a number by up to 2^-8 of itself. A gradient passes through four roundings
(logits, probabilities, product, result): 4 * 2^-8 of the largest entry. Values are float32 sums over logits, which
reach 8 and are rounded once by the product and once where an adapter's is added.
"""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from posttrain_lib.ops.fused import has_kernels  # noqa: E402
from posttrain_lib.ops.head_chunks import ChunkedHead  # noqa: E402
from posttrain_lib.ops.head_reference import (  # noqa: E402
    linear_cross_entropy_reference,
    token_logprobs_reference,
)
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy, token_logprobs  # noqa: E402
from posttrain_lib.ops.output_head import HeadAdapter, OutputHead  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

GRADIENT = 4 * 2.0**-8
VALUE = 2 * 8 * 2.0**-8
GIB = 1 << 30


def make_head(entries: int, size: int, *, real: int | None = None, adapter: bool = False, softcap: float | None = None):
    """A bfloat16 head on the GPU whose logits are about normal."""

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device="cuda") * size**-0.5).bfloat16().requires_grad_()

    low_rank = HeadAdapter(normal(16, size), normal(entries, 16), 2.0) if adapter else None
    return OutputHead(normal(entries, size), real, 0.9, softcap, low_rank)


def make_rows(tokens: int, size: int, entries: int) -> tuple[torch.Tensor, ...]:
    """(hidden, targets, loss weights, index) on the GPU, two thirds of the tokens supervised."""
    hidden = torch.randn(tokens, size, device="cuda").bfloat16().requires_grad_()
    index = torch.arange(tokens, device="cuda")
    return (
        hidden,
        torch.randint(entries, (tokens,), device="cuda"),
        torch.rand(tokens, device="cuda"),
        index[index % 3 > 0],
    )


def inputs_of(hidden: torch.Tensor, head: OutputHead) -> list[torch.Tensor]:
    adapter = [] if head.adapter is None else [head.adapter.down_RD, head.adapter.up_VR]
    return [hidden, head.weight_VD, *adapter]


def in_float32(hidden: torch.Tensor, head: OutputHead) -> tuple[torch.Tensor, OutputHead]:
    """The same numbers as leaves in float32, whose own rounding is nothing beside bfloat16's."""
    hidden, weight, *low = (tensor.detach().float().requires_grad_() for tensor in inputs_of(hidden, head))
    adapter = HeadAdapter(*low, head.adapter.scale) if head.adapter is not None else None
    return hidden, dataclasses.replace(head, weight_VD=weight, adapter=adapter)


def assert_gradients_near(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        worst, largest = float((one.float() - other).abs().max()), float(other.abs().max())
        assert worst <= GRADIENT * largest, f"off by {worst:.3g} where entries reach {largest:.3g}"


@pytest.fixture(autouse=True)
def _full_float32() -> None:
    """No TF32 in the reference."""
    torch.backends.cuda.matmul.allow_tf32 = False


def test_a_gpu_takes_the_kernels() -> None:
    """Else the tests below would not test them."""
    assert has_kernels("cuda")
    hidden = torch.zeros(4, 64, device="cuda", dtype=torch.bfloat16)
    assert ChunkedHead(make_head(128, 64), hidden, torch.arange(4, device="cuda")).kernels


@pytest.mark.parametrize(
    ("entries", "real", "softcap", "adapter"),
    [(32064, None, None, False), (50257, 50200, 30.0, True)],
    ids=["plain", "odd-padded-capped-adapter"],
)
@pytest.mark.parametrize("chunk_tokens", [None, 384])
def test_cross_entropy_and_logprobs(entries, real, softcap, adapter, chunk_tokens) -> None:
    torch.manual_seed(0)
    head = make_head(entries, 512, real=real, adapter=adapter, softcap=softcap)
    hidden, targets, weights, index = make_rows(1500, 512, real or entries)
    wide_hidden, wide_head = in_float32(hidden, head)

    loss, nll = linear_cross_entropy(hidden, head, targets, weights, index, chunk_tokens=chunk_tokens)
    expected, expected_nll = linear_cross_entropy_reference(wide_hidden, wide_head, targets, weights, index)
    torch.testing.assert_close(nll, expected_nll, rtol=0, atol=VALUE)
    torch.testing.assert_close(loss, expected, rtol=2.0**-8, atol=0)
    assert_gradients_near(
        torch.autograd.grad(loss * 0.01, inputs_of(hidden, head)),
        torch.autograd.grad(expected * 0.01, inputs_of(wide_hidden, wide_head)),
    )

    pulls = torch.randn(2, len(index), device="cuda")
    options = {"with_entropy": True, "chunk_tokens": chunk_tokens, "temperature": 0.8}
    found = token_logprobs(hidden, head, targets, index, **options)
    expected = token_logprobs_reference(wide_hidden, wide_head, targets, index, temperature=0.8)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=VALUE)
    assert_gradients_near(
        torch.autograd.grad((found[0] * pulls[0] + found[1] * pulls[1]).sum(), inputs_of(hidden, head)),
        torch.autograd.grad((expected[0] * pulls[0] + expected[1] * pulls[1]).sum(), inputs_of(wide_hidden, wide_head)),
    )


@pytest.mark.parametrize("tokens", [6144, 8192], ids=["one-chunk", "two-chunks"])
def test_memory_beside_inputs_and_gradients(tokens: int) -> None:
    """At most 1.5 GiB besides inputs, the hidden states' gradient and a float32 sum of the weight's."""
    size, entries = 2048, 128256
    head = make_head(entries, size)
    hidden, targets, weights, _ = make_rows(tokens, size, entries)
    index = torch.arange(tokens, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = linear_cross_entropy(hidden, head, targets, weights, index)
    in_forward = torch.cuda.max_memory_allocated() - before
    torch.autograd.grad(loss, [hidden, head.weight_VD])
    in_all = torch.cuda.max_memory_allocated() - before
    weight_sum, hidden_sum = 4 * entries * size, 4 * tokens * size
    assert in_forward <= weight_sum + hidden_sum + 1.5 * GIB
    # the backward holds the sum and the gradient that it is written to, but no logits
    assert in_all <= weight_sum + weight_sum // 2 + 2 * hidden_sum + 1.5 * GIB


def test_the_host_never_waits() -> None:
    head = make_head(4096, 256)
    hidden, targets, weights, index = make_rows(600, 256, 4096)

    def step() -> None:
        loss, _ = linear_cross_entropy(hidden, head, targets, weights, index, chunk_tokens=128)
        (loss * 0.5).backward()
        logprobs, entropy = token_logprobs(hidden, head, targets, index, with_entropy=True)
        (logprobs + entropy).sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_factor_from_outside() -> None:
    """1 leaves the gradient as it is; another scales it in float32, also where one product wrote it in bfloat16."""
    head = make_head(4096, 256)
    hidden, targets, weights, index = make_rows(600, 256, 4096)
    gradients = {}
    for factor in (1.0, 0.3):
        loss, _ = linear_cross_entropy(hidden, head, targets, weights, index)
        (gradients[factor],) = torch.autograd.grad(loss * factor, head.weight_VD)
    expected = (gradients[1.0].float() * torch.tensor(0.3, device="cuda")).bfloat16()
    assert torch.equal(gradients[0.3], expected)


def test_offsets_beyond_32_bits() -> None:
    """A buffer of more than 2^31 products, the last rows' against the same rows alone."""
    entries, rows = 262144, 8448
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * GIB:
        pytest.skip(f"needs 8 GiB of the GPU's memory, {free / GIB:.1f} are free")
    from posttrain_lib.ops import head_triton

    assert rows * entries > 2**31
    products = torch.empty(rows, entries, device="cuda", dtype=torch.bfloat16)
    products[:-4] = 0
    last = torch.randn(4, entries, device="cuda").bfloat16()
    products[-4:] = last
    targets = torch.randint(entries, (rows,), device="cuda")
    options = {"with_entropy": True, "with_gradient": True}
    found = head_triton.row_statistics(products, targets, entries, (None, 1.0), **options)
    expected = head_triton.row_statistics(last, targets[-4:], entries, (None, 1.0), **options)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[-4:], other)
    assert torch.equal(products[-4:], last)
    # and the first rows were not written by a place that had wrapped around
    torch.testing.assert_close(found[0][:-4], torch.full_like(found[0][:-4], entries).log(), rtol=1e-6, atol=0)
    assert int((products[0] != 1 / entries).sum()) == 1
