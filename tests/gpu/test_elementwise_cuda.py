"""The kernels of norm, rope and gated activations on a CUDA device, against torch's operations there and float64.

Needs PyTorch, Triton, numpy and pytest alone: a bare GPU machine runs it (``python infra/gpu_suite.py``). Odd shapes,
strides and every option are in ``tests/unit/ops/elementwise_triton_cases.py``, under Triton's interpreter.

Tolerances. Against torch: a sum in another order and fast exponentials move float32's last bits, of numbers up to some
5 in size whose exponents reach 17 units of 2^-23 each. In half precision that rarely turns a rounding, which moves the
result by a unit, or by two where the turned one is followed by another. Gradients: see ``assert_near``.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from posttrain_lib.ops import norm, rope, swiglu  # noqa: E402
from posttrain_lib.ops.fused import fuses  # noqa: E402
from tests.unit.ops.elementwise_cases import assert_near, in_float64, strided, with_gradients  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

GIB = 1 << 30
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
RELATIVE = {FLOAT32: 4e-6, BFLOAT16: 2 * 2.0**-7}
#: of the entries in half precision, those whose rounding is turned: a float32 unit lies beside 2^16 of bfloat16's
TURNED = 0.01
NORMS = [
    (FLOAT32, FLOAT32, (1000, 1024), {}),
    (BFLOAT16, FLOAT32, (600, 16, 128), {}),
    (BFLOAT16, BFLOAT16, (513, 2560), {"plus_one": True, "late_cast": True}),
    (BFLOAT16, BFLOAT16, (40, 16384), {}),
]


def without_kernels(monkeypatch: pytest.MonkeyPatch, function, *inputs: torch.Tensor) -> torch.Tensor:
    """What torch's own operations make of the inputs."""
    with monkeypatch.context() as patch:
        for module in (norm, rope, swiglu):
            patch.setattr(module, "fuses", lambda *_: False)
        return function(*inputs)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, through: torch.dtype) -> None:
    """Equal but for float32's last bits, and in half precision for few roundings that they turn."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=RELATIVE[through], atol=1e-5)
    if through != FLOAT32:
        assert float((found != expected).float().mean()) <= TURNED


def test_a_gpu_takes_the_kernels() -> None:
    """Else the tests below would not test them."""
    assert fuses(torch.zeros(2, device="cuda"), torch.nn.Parameter(torch.zeros(2, device="cuda")))


@pytest.mark.parametrize(("dtype", "weight_dtype", "shape", "options"), NORMS)
def test_norm(dtype, weight_dtype, shape, options, monkeypatch) -> None:
    def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm.rms_norm(hidden, weight, 1e-6, **options)

    inputs = [strided(shape, dtype, 0, "cuda"), 1 + 0.3 * strided(shape[-1:], weight_dtype, 1, "cuda")]
    found = with_gradients(function, inputs)
    assert_alike(found[0], without_kernels(monkeypatch, function, *inputs), dtype)
    assert_near(found, in_float64(function, inputs, rounded=found[0].dtype), 3, dtype)
    for one, other in zip(found, with_gradients(function, inputs), strict=True):
        assert torch.equal(one, other)  # sums have one order


@pytest.mark.parametrize(
    ("dtype", "shape", "dims", "interleaved"),
    [
        (FLOAT32, (700, 16, 128), 128, False),
        (BFLOAT16, (300, 40, 96), 32, False),
        (BFLOAT16, (300, 3, 192), 64, True),
    ],
)
def test_rope_has_the_bits_of_torch(dtype, shape, dims: int, interleaved: bool, monkeypatch) -> None:
    def function(heads: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        return rope.apply_rope(heads, *tables, interleaved=interleaved)

    frequencies = 1e4 ** -(torch.arange(0, dims, 2, device="cuda") / dims)
    tables = rope.rope_tables(torch.arange(shape[0], device="cuda"), frequencies)
    heads = strided(shape, dtype, 0, "cuda")
    found = with_gradients(function, [heads], *tables)
    assert torch.equal(found[0], without_kernels(monkeypatch, function, heads, *tables))
    assert_near(found, in_float64(function, [heads], *tables, rounded=dtype), 1, dtype)


@pytest.mark.parametrize(
    ("dtype", "name"), [(FLOAT32, "silu"), (BFLOAT16, "silu"), (BFLOAT16, "gelu_tanh"), (BFLOAT16, "gelu")]
)
def test_gated_activations(dtype, name: str, monkeypatch) -> None:
    function = swiglu.GATED[name]
    inputs = [strided((500, 3072), dtype, seed, "cuda") for seed in (0, 1)]
    found = with_gradients(function, inputs)
    assert_alike(found[0], without_kernels(monkeypatch, function, *inputs), dtype)
    assert_near(found, in_float64(function, inputs, rounded=dtype), 3, dtype)


def step() -> None:
    """Forward and backward of all three under autocast, on the dtypes that a block has."""
    stream = torch.randn(64, 256, device="cuda", requires_grad=True)
    weight = torch.ones(256, device="cuda", requires_grad=True)
    projection = torch.randn(256, 256, device="cuda", requires_grad=True)
    tables = rope.rope_tables(torch.arange(64, device="cuda"), torch.ones(32, device="cuda"))
    with torch.autocast("cuda", BFLOAT16):
        heads = torch.nn.functional.linear(norm.rms_norm(stream, weight, 1e-6), projection).unflatten(-1, (4, 64))
        turned = rope.apply_rope(norm.rms_norm(heads, weight[:64], 1e-6), *tables)
        product = swiglu.swiglu(turned, turned.flip(0))
    assert (heads.dtype, turned.dtype, product.dtype) == (BFLOAT16, FLOAT32, FLOAT32)
    product.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == FLOAT32 for leaf in (stream, weight, projection))


def test_the_host_never_waits() -> None:
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 entries, the last rows' results against the same rows alone."""
    columns, rows = 16384, 2**17 + 8
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * GIB:
        pytest.skip(f"needs 24 GiB of the GPU's memory, {free / GIB:.1f} are free")
    assert rows * columns > 2**31
    weight = torch.randn(columns, device="cuda").bfloat16()
    large = torch.zeros(rows, columns, device="cuda", dtype=BFLOAT16)
    large[-8:] = torch.randn(8, columns, device="cuda").bfloat16()
    last = large[-8:].clone()
    found = norm.rms_norm(large, weight, 1e-6)
    assert torch.equal(found[-8:], norm.rms_norm(last, weight, 1e-6))
    assert not found[:8].any()  # not written by a place that had wrapped around
    found = swiglu.swiglu(large, large)
    assert torch.equal(found[-8:], swiglu.swiglu(last, last))
    assert not found[:8].any()
    heads = large.unflatten(-1, (128, 128))
    tables = rope.rope_tables(torch.arange(rows, device="cuda"), torch.ones(64, device="cuda"))
    found = rope.apply_rope(heads, *tables)
    assert torch.equal(found[-8:], rope.apply_rope(heads[-8:], *(table[-8:] for table in tables)))
    assert not found[:8].any()
