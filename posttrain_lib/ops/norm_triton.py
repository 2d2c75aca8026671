"""RMS norm on a GPU, as Triton kernels: each row is read once forward, and once with its gradient backward.

Torch takes a pass for every product, cast and sum, over float32 tensors of the input's full size. Here a program holds
whole rows in registers, several where they are short (a norm per head). Beside the input, one float32 number per row is
kept for the backward. Each program of the backward adds up the weight's gradient over rows of its own; torch adds the
programs' sums, so that the order is the same in every run on a device.

``ops.norm`` is the same in torch, for everything else. ``TRITON_INTERPRET=1`` runs the kernels on a CPU's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

#: a row longer than this does not fit in a program's registers
MAX_COLUMNS = 16384
# Entries that a program holds at a time where rows are short enough, and how many each lane has of them.
_ENTRIES = 2048
_ENTRIES_PER_LANE = 16
# Backward programs per multiprocessor: more than run at a time, so that none waits long for the last; few enough that
# their sums of the weight's gradient are little beside the rows.
_PROGRAMS_PER_PROCESSOR = 8


def rms_norm_kernels(
    hidden: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, late_cast: bool = False
) -> Tensor:
    """:func:`posttrain_lib.ops.norm.rms_norm` of float32 or half precision, any strides; the result is contiguous.

    Roundings are those of the torch version, in the same order. The sum over a row is ordered otherwise, so that
    ``1 / rms`` may differ in float32's last bits, and with it, rarely, a rounding to half precision.
    """
    return _RMSNorm.apply(hidden, weight, eps, plus_one, late_cast)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, plus_one: bool, late_cast: bool) -> Tensor:
        columns = hidden.shape[-1]
        dtype = hidden.dtype if late_cast else torch.promote_types(hidden.dtype, weight.dtype)
        out = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        rows = out.numel() // columns
        inverses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        weight = weight.contiguous()
        if rows:
            hidden, *places = _rows_of(hidden)
            options = _block(columns)
            with torch.cuda.device_of(hidden):
                _forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
                    hidden,
                    weight,
                    out,
                    inverses,
                    rows,
                    columns,
                    *places,
                    eps,
                    1.0 / columns,
                    PLUS_ONE=plus_one,
                    LATE=late_cast,
                    **options,
                )
        ctx.save_for_backward(hidden, weight, inverses)
        ctx.plus_one = plus_one
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, inverses = ctx.saved_tensors
        rows, columns = len(inverses), hidden.shape[-1]
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        options = _block(columns)
        programs = min(triton.cdiv(rows, options["ROWS"]), _programs(hidden.device))
        with_weight = ctx.needs_input_grad[1]
        sums = torch.empty((programs, columns) if with_weight else 0, dtype=torch.float32, device=hidden.device)
        if rows:
            hidden, *places = _rows_of(hidden)
            grad, *grad_places = _rows_of(grad)
            with torch.cuda.device_of(hidden):
                _backward_kernel[(programs,)](
                    hidden,
                    grad,
                    weight,
                    inverses,
                    grad_hidden,
                    sums,
                    rows,
                    columns,
                    *places,
                    *grad_places,
                    1.0 / columns,
                    PLUS_ONE=ctx.plus_one,
                    WEIGHT=with_weight,
                    **options,
                )
        grad_weight = sums.sum(0).to(weight.dtype) if with_weight else None
        return grad_hidden, grad_weight, None, None, None


def _rows_of(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """(tensor, n, outer, inner): row r begins ``r // n * outer + r % n * inner`` entries behind the first.

    A copy where the last dimension is not contiguous or four of them do not make up two.
    """
    if tensor.stride(-1) != 1 or tensor.ndim > 3:
        tensor = tensor.contiguous()
    if tensor.is_contiguous():
        return tensor, 1, tensor.shape[-1], 0
    if tensor.ndim == 2:
        return tensor, 1, tensor.stride(0), 0
    if tensor.stride(0) == tensor.shape[1] * tensor.stride(1):
        return tensor, 1, tensor.stride(1), 0
    return tensor, tensor.shape[1], tensor.stride(0), tensor.stride(1)


def _block(columns: int) -> dict[str, int]:
    """Sizes of a program: rows, their padded length, warps of 32 lanes."""
    block = triton.next_power_of_2(columns)
    rows = max(1, _ENTRIES // block)
    warps = max(1, min(16, rows * block // (32 * _ENTRIES_PER_LANE)))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_PER_PROCESSOR
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _forward_kernel(
    hidden,
    weight,
    out,
    inverses,
    rows,
    columns,
    group,
    outer_stride,
    inner_stride,
    eps,
    one_of_columns,
    PLUS_ONE: tl.constexpr,
    LATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    here = (row < rows)[:, None] & (at < columns)[None, :]
    start = (row // group).to(tl.int64) * outer_stride + (row % group).to(tl.int64) * inner_stride
    wide = tl.load(hidden + start[:, None] + at[None, :], mask=here, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) * one_of_columns + eps)
    tl.store(inverses + row, inverse, mask=row < rows)
    normed = wide * inverse[:, None]
    factor = tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
    if PLUS_ONE:
        factor = 1.0 + factor
    if not LATE:
        # where the torch version rounds: the factor to the weight's dtype, the normalised value to the input's
        factor = factor.to(weight.dtype.element_ty).to(tl.float32)
        normed = normed.to(hidden.dtype.element_ty).to(tl.float32)
    result = factor[None, :] * normed
    target = out + row.to(tl.int64)[:, None] * columns + at[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=here)


@triton.jit
def _backward_kernel(
    hidden,
    grads,
    weight,
    inverses,
    grad_hidden,
    sums,
    rows,
    columns,
    group,
    outer_stride,
    inner_stride,
    grad_group,
    grad_outer_stride,
    grad_inner_stride,
    one_of_columns,
    PLUS_ONE: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d normed / d hidden = inverse * (1 - normed normed^T / columns), a program's rows one block after the other."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (at < columns)[None, :]
        start = (row // group).to(tl.int64) * outer_stride + (row % group).to(tl.int64) * inner_stride
        wide = tl.load(hidden + start[:, None] + at[None, :], mask=here, other=0.0).to(tl.float32)
        start = (row // grad_group).to(tl.int64) * grad_outer_stride + (row % grad_group).to(
            tl.int64
        ) * grad_inner_stride
        grad = tl.load(grads + start[:, None] + at[None, :], mask=here, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + row, mask=row < rows, other=0.0)[:, None]
        normed = wide * inverse
        if WEIGHT:
            total += grad * normed
        # read again for every block: in registers it would take the room of a row
        factor = tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
        if PLUS_ONE:
            factor = 1.0 + factor
        grad = grad * factor[None, :]
        along = tl.sum(grad * normed, axis=1) * one_of_columns
        result = (grad - normed * along[:, None]) * inverse
        target = grad_hidden + row.to(tl.int64)[:, None] * columns + at[None, :]
        tl.store(target, result.to(grad_hidden.dtype.element_ty), mask=here)
    if WEIGHT:
        place = sums + tl.program_id(0).to(tl.int64) * columns + at
        tl.store(place, tl.sum(total, axis=0), mask=at < columns)
