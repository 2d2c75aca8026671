"""The kernels of norm, rope and gated activations on a CPU's tensors, under Triton's interpreter, against float64.

The interpreter must be chosen before Triton is imported: ``test_elementwise_triton`` runs this file in a process of its
own. It cuts off to bfloat16 where a GPU rounds, so that a rounding is a unit of the last place here, not half of one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain_lib.ops import fused, norm_triton, rope_triton, swiglu_triton
from posttrain_lib.ops.norm import rms_norm
from posttrain_lib.ops.rope import apply_rope, rope_tables
from posttrain_lib.ops.swiglu import GATED
from tests.unit.ops.elementwise_cases import NORMS, TURNS, assert_near, in_float64, strided, with_gradients

HALF = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_tanh", "gelu"]
#: of a result: the factor, the normalised value or the activation, and the product itself
ROUNDINGS = 3


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations on a CPU's tensors take the way that they take on a GPU."""
    monkeypatch.setattr(fused, "has_kernels", lambda _: True)


def counted(module, name: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each call of a module's function."""
    calls: list[object] = []
    inner = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: (calls.append(name), inner(*args, **options))[1])
    return calls


def norm_of(options: dict[str, bool]):
    return lambda hidden, weight: rms_norm(hidden, weight, 1e-5, **options)


@pytest.mark.parametrize(("dtype", "weight_dtype", "shape", "options"), NORMS)
@pytest.mark.parametrize("entries", [16, 2048], ids=["a-row-each", "rows-together"])
def test_norm(dtype, weight_dtype, shape, options, entries: int, monkeypatch) -> None:
    monkeypatch.setattr(norm_triton, "_ENTRIES", entries)
    monkeypatch.setattr(norm_triton, "_PROGRAMS_PER_PROCESSOR", 2)  # so that each goes over several rows
    calls = counted(norm_triton, "rms_norm_kernels", monkeypatch)
    inputs = [strided(shape, dtype, 0), 1 + 0.3 * strided(shape[-1:], weight_dtype, 1)]
    found = with_gradients(norm_of(options), inputs)
    assert calls
    assert_near(found, in_float64(norm_of(options), inputs, rounded=found[0].dtype), ROUNDINGS, dtype)
    monkeypatch.setattr(fused, "has_kernels", lambda _: False)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in with_gradients(norm_of(options), inputs)]
    assert len(calls) == 1


def test_norm_of_a_frozen_weight_forms_no_gradient_of_it() -> None:
    hidden, weight = strided((5, 16), torch.float32, 0).requires_grad_(), torch.ones(16)
    rms_norm(hidden, weight, 1e-5).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_norm_of_rows_that_are_no_two_dimensions() -> None:
    """Views that a step in each of two dimensions describes are read where they lie; a transposed one is copied."""
    heads = torch.randn(4, 3, 2 * 16)[..., :16]
    assert norm_triton._rows_of(heads) == (heads, 1, 32, 0)
    apart = torch.randn(4, 5, 16)[:, :3]
    assert norm_triton._rows_of(apart)[1:] == (3, 80, 16)
    for view in (heads, apart, torch.randn(16, 3, 4).permute(2, 1, 0), torch.randn(16).expand(4, 3, 16)):
        expected = rms_norm(view.double(), torch.ones(16).double(), 1e-5).float()
        torch.testing.assert_close(rms_norm(view, torch.ones(16), 1e-5), expected, rtol=2e-6, atol=0)


def tables_of(tokens: int, dims: int) -> tuple[Tensor, Tensor]:
    return rope_tables(torch.arange(tokens) * 5, 100.0 ** -(torch.arange(0, dims, 2) / dims))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("shape", "dims", "interleaved"), TURNS)
@pytest.mark.parametrize("pairs", [16, 1024], ids=["few-at-once", "all-at-once"])
def test_rope(dtype, shape, dims: int, interleaved: bool, pairs: int, monkeypatch) -> None:
    monkeypatch.setattr(rope_triton, "_PAIRS", pairs)
    calls = counted(rope_triton, "apply_rope_kernel", monkeypatch)
    heads, tables = strided(shape, dtype, 0), tables_of(shape[0], dims)

    def turn(heads: Tensor, *tables: Tensor) -> Tensor:
        return apply_rope(heads, *tables, interleaved=interleaved)

    found = with_gradients(turn, [heads], *tables)
    assert calls
    assert_near(found, in_float64(turn, [heads], *tables, rounded=dtype), 1, dtype)
    assert torch.equal(found[0][..., dims:], heads[..., dims:])
    if dtype == torch.float32:
        monkeypatch.setattr(fused, "has_kernels", lambda _: False)
        assert torch.equal(found[0], turn(heads, *tables))
    assert len(calls) == 1


def test_rope_with_one_row_of_tables_for_all() -> None:
    heads, (cosine, sine) = torch.randn(5, 2, 8), tables_of(2, 8)
    expected = apply_rope(heads.double(), cosine[1:], sine[1:]).float()
    torch.testing.assert_close(apply_rope(heads, cosine[1:], sine[1:]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activations(dtype, name: str, monkeypatch) -> None:
    monkeypatch.setattr(swiglu_triton, "_BLOCK", 64)
    calls = counted(swiglu_triton, "gated", monkeypatch)
    inputs = [3 * strided((9, 20), dtype, 0), strided((9, 20), dtype, 1)]
    found = with_gradients(GATED[name], inputs)
    assert calls
    assert [tensor.dtype for tensor in found] == [dtype] * 3
    assert_near(found, in_float64(GATED[name], inputs, rounded=dtype), ROUNDINGS, dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_far_from_zero(name: str) -> None:
    gate = torch.tensor([-200.0, -90.0, -20.0, -5.0, 0.0, 20.0, 200.0])
    found = with_gradients(GATED[name], [gate, torch.ones(7)])
    for one, other in zip(found, in_float64(GATED[name], [gate, torch.ones(7)], rounded=torch.float32), strict=True):
        # exact gelu, as torch has it, loses what 1 + erf loses near -1: half a unit of 1, times the gate
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5 if name == "gelu" else 1e-12)


def test_nothing_to_do() -> None:
    """No rows: no program starts, and gradients have their shapes."""
    found = with_gradients(norm_of({}), [torch.zeros(0, 16), torch.ones(16)])
    assert [tensor.shape for tensor in found] == [(0, 16), (0, 16), (16,)]
    assert torch.equal(found[2], torch.zeros(16))
    assert with_gradients(apply_rope, [torch.zeros(0, 2, 8)], *tables_of(0, 8))[1].shape == (0, 2, 8)
    assert with_gradients(GATED["silu"], [torch.zeros(0, 8), torch.zeros(0, 8)])[1].shape == (0, 8)


def test_what_a_kernel_takes() -> None:
    plain, parameter = torch.zeros(2), torch.nn.Parameter(torch.zeros(2).bfloat16())
    assert fused.fuses(plain, parameter)
    assert not fused.fuses(plain, torch.zeros(2, dtype=torch.float64))
    assert not fused.fuses(plain, torch.Tensor._make_subclass(type("Laid", (Tensor,), {}), plain))

    seen = []

    def ask(values: Tensor) -> Tensor:
        seen.append(fused.fuses(values))
        return values + 1

    torch.compile(ask, backend="eager")(plain)
    assert seen == [False]
