"""The mixture of experts, the short convolution and the gated delta rule on a CUDA device, against the readable
versions on the CPU in float64.

Needs PyTorch, numpy and pytest alone: a bare GPU machine runs it (``python infra/gpu_suite.py``).

Tolerances, relative to the largest entry. float32: sums of at most a few thousand terms in another order, and in the
delta rule triangular systems of 64 rows: 2e-5 is some 170 times float32's epsilon. bfloat16: its epsilon is 2^-8, and
a result of the mixture passes through gate, up, three factors of the activation, down, the weighted output and the
sum, each rounded by half an epsilon: 8 epsilon bounds a gradient through all of them with some room. A wrong expert,
document or tap moves results by the size of the values themselves.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from posttrain_lib.ops import experts as ops  # noqa: E402
from posttrain_lib.ops.attention import DocumentLayout  # noqa: E402
from posttrain_lib.ops.experts import clamped_swiglu, mixture  # noqa: E402
from posttrain_lib.ops.gated_delta import gated_delta_rule  # noqa: E402
from posttrain_lib.ops.reference import (  # noqa: E402
    gated_delta_rule_reference,
    mixture_reference,
    short_convolution_reference,
)
from posttrain_lib.ops.short_convolution import short_convolution  # noqa: E402
from posttrain_lib.ops.swiglu import swiglu  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

DEVICE = "cuda"
LENGTHS = (5, 1, 130, 64, 300)
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 8 * 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", list(RELATIVE), ids=["fp32", "bf16"])
TOKENS, CHOICES, EXPERTS, HIDDEN, FORWARD = 400, 4, 16, 64, 96
#: experts that the ids below reach; the others stay idle
BUSY = 11


@pytest.fixture(autouse=True)
def _full_float32() -> None:
    """No TF32: the float32 bounds above are float32's."""
    torch.backends.cuda.matmul.allow_tf32 = False


def assert_near(found, expected, dtype, what):
    """Largest difference against the largest entry."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    worst, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert torch.isfinite(found).all(), f"{what}: not finite"
    assert worst <= RELATIVE[dtype] * size, f"{what}: off by {worst:.3g} where entries reach {size:.3g}"


def layout_on(device):
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return DocumentLayout.of(bounds, max(LENGTHS))


def compare(fast, readable, start, dtype):
    """Outputs and gradients of ``fast`` on the device and of ``readable`` in float64, from the same rounded numbers."""
    exact = [item.double().requires_grad_() for item in start]
    moved = [item.to(DEVICE).requires_grad_() for item in start]
    expected, found = readable(*exact), fast(*moved)
    pulls = [torch.randn(item.shape).to(dtype) for item in expected]
    wanted = torch.autograd.grad(expected, exact, [pull.double() for pull in pulls])
    got = torch.autograd.grad(found, moved, [p.to(DEVICE, f.dtype) for p, f in zip(pulls, found, strict=True)])
    for number, (one, other) in enumerate(zip([*found, *got], [*expected, *wanted], strict=True)):
        assert_near(one, other, dtype, f"result {number}: outputs, then gradients of the inputs in their order")


def mixture_inputs(dtype):
    """ids, and hidden, weights, projections and biases, scaled so that every stage is of size about 1."""
    ids = torch.rand(TOKENS, BUSY).argsort(1)[:, :CHOICES]
    shapes = [(EXPERTS, FORWARD, HIDDEN), (EXPERTS, FORWARD, HIDDEN), (EXPERTS, HIDDEN, FORWARD)]
    projections = [torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes]
    biases = [torch.randn(EXPERTS, size) for size in (FORWARD, FORWARD, HIDDEN)]
    start = [torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, CHOICES), *projections, *biases]
    return ids, [item.to(dtype) for item in start]


def through(operation, ids, activation):
    def run(hidden, weights, gate, up, down, gate_bias, up_bias, down_bias):
        biases = {"gate_bias_EF": gate_bias, "up_bias_EF": up_bias, "down_bias_ED": down_bias}
        return (operation(hidden, ids.to(hidden.device), weights, gate, up, down, activation=activation, **biases),)

    return run


@DTYPES
@pytest.mark.parametrize("activation", [swiglu, clamped_swiglu])
def test_mixture_and_its_gradients(dtype, activation):
    ids, start = mixture_inputs(dtype)
    compare(through(mixture, ids, activation), through(mixture_reference, ids, activation), start, dtype)


def test_bfloat16_takes_the_grouped_kernel_and_never_waits():
    """Nothing is read back from the device, forward or backward, and idle experts have gradients of zeros although
    the memory that the kernel writes to held something else before."""
    ids, start = mixture_inputs(torch.bfloat16)
    leaves = [item.to(DEVICE).requires_grad_() for item in start]
    groups = ops.ExpertGroups.of(ids.to(DEVICE), EXPERTS)
    assert ops._has_grouped_kernel(leaves[0], (FORWARD, HIDDEN), groups)
    run = through(mixture, ids.to(DEVICE), swiglu)
    torch.autograd.grad(run(*leaves)[0].sum(), leaves)  # what is made once is made before
    soiled = [torch.full_like(leaf, float("nan")) for leaf in leaves for _ in range(4)]
    del soiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = torch.autograd.grad(run(*leaves)[0].sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for gradient in gradients[2:]:
        assert not gradient[BUSY:].any()
        assert gradient[:BUSY].any()


def test_mixture_without_tokens_has_gradients_of_zeros():
    ids, start = mixture_inputs(torch.bfloat16)
    leaves = [item.to(DEVICE).requires_grad_() for item in (start[0][:0], start[1][:0], *start[2:])]
    (output,) = through(mixture, ids[:0].to(DEVICE), swiglu)(*leaves)
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert not gradient.any()


@DTYPES
@pytest.mark.parametrize("activation", [None, "silu"])
def test_short_convolution_and_its_gradients(dtype, activation):
    channels, taps = 48, 4
    shapes = [(sum(LENGTHS), channels), (channels, taps), (channels,), (len(LENGTHS), channels, taps - 1)]

    def fast(hidden, weight, bias, state):
        options = {"bias_C": bias, "activation": activation, "initial_state": state}
        return short_convolution(hidden, weight, layout_on(DEVICE), **options)

    def readable(hidden, weight, bias, state):
        options = {"bias_C": bias, "activation": activation, "initial_state": state}
        return short_convolution_reference(hidden, weight, LENGTHS, **options)

    compare(fast, readable, [torch.randn(shape).to(dtype) for shape in shapes], dtype)


@DTYPES
def test_gated_delta_rule_and_its_gradients(dtype):
    heads, key, value, tokens = 4, 32, 48, sum(LENGTHS)
    start = [torch.randn(tokens, heads, key), torch.randn(tokens, heads, key), torch.randn(tokens, heads, value)]
    start += [-torch.rand(tokens, heads), torch.rand(tokens, heads), torch.randn(len(LENGTHS), heads, key, value)]

    def fast(*items):
        *items, state = items
        return gated_delta_rule(*items, layout_on(DEVICE), scale=key**-0.5, normalise=True, initial_state=state)

    def readable(*items):
        *items, state = items
        return gated_delta_rule_reference(*items, LENGTHS, scale=key**-0.5, normalise=True, initial_state=state)

    compare(fast, readable, [item.to(dtype) for item in start], dtype)
