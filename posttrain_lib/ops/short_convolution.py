"""The causal depthwise convolution in front of a linear-attention layer, over packed documents.

Every document is laid behind the W - 1 rows that come before its first token: zeros, or what an earlier call left. The
convolution of that longer row never reaches from one document into another, without a mask. It is a sum of W shifted
products in float32, rounded once, as a convolution kernel does it. Boundaries are used as a tensor alone, so nothing
is read back from a GPU.

C channels, W taps, n documents, U = T + n * (W - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from posttrain_lib.errors import ConfigError
from posttrain_lib.ops.attention import DocumentLayout, attention_dtype


def refuse_shared_prefixes(layout: DocumentLayout, operation: str) -> None:
    """Stop where documents share a beginning: what runs along a document needs each one whole.

    Raises:
        ConfigError: the layout has segments that continue others.
    """
    if layout.prefixes is not None:
        raise ConfigError(
            f"{operation} cannot go on in the middle of another document",
            got="a packed row whose documents share their beginnings",
            expected="whole documents",
            fix="set train.share_prefixes: false for models with linear attention",
        )


def short_convolution(
    hidden_TC: Tensor,
    weight_CW: Tensor,
    layout: DocumentLayout,
    *,
    bias_C: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out[t] = activation(bias + sum over j of weight[:, W-1-j] * hidden[t-j])``, j within t's document.

    As torch.nn.Conv1d with one group per channel and W - 1 zeros before each document, cut to its length.

    Args:
        hidden_TC: [T, C]. weight_CW: [C, W], the last tap is the token's own. bias_C: [C].
        layout: the documents; whole ones.
        activation: None or "silu".
        initial_state: [n, C, W-1], the inputs before each document's first token, oldest first; None = zeros.

    Returns:
        (out_TC, final_state [n, C, W-1]) in the dtype of the computation (autocast's where it is on). The state is
        the initial state of the document's next tokens. Both are differentiable once.

    Raises:
        ConfigError: documents that share a beginning.
    """
    refuse_shared_prefixes(layout, "a convolution along documents")
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is none of None, 'silu'")
    dtype = attention_dtype(hidden_TC)
    tokens, channels = hidden_TC.shape
    before, documents = weight_CW.shape[1] - 1, layout.cu_seqlens.shape[0] - 1
    bounds = layout.cu_seqlens.to(torch.int64)
    row = torch.arange(tokens, device=hidden_TC.device)
    document = torch.bucketize(row, bounds[1:], right=True)
    own = row + (document + 1) * before
    # the `before` rows in front of document d begin at bounds[d] + d * before; those that end it, at bounds[d + 1] +
    # d * before: they reach back into the rows in front where the document is shorter
    ordinal = torch.arange(documents, device=hidden_TC.device)
    span = torch.arange(before, device=hidden_TC.device)
    with torch.autocast(hidden_TC.device.type, enabled=False):
        rows_UC = hidden_TC.new_zeros((tokens + documents * before, channels), dtype=dtype)
        rows_UC = rows_UC.index_copy(0, own, hidden_TC.to(dtype))
        if initial_state is not None:
            front = ((bounds[:-1] + ordinal * before)[:, None] + span).flatten()
            rows_UC = rows_UC.index_copy(0, front, initial_state.to(dtype).transpose(1, 2).flatten(0, 1))
        summed = _Taps.apply(rows_UC, weight_CW.to(dtype), None if bias_C is None else bias_C.to(dtype))
        output = PickRows.apply(summed, own - before)
        behind = ((bounds[1:] + ordinal * before)[:, None] + span).flatten()
        final_state = rows_UC.index_select(0, behind).reshape(documents, before, channels).transpose(1, 2)
        return silu(output) if activation == "silu" else output, final_state


class PickRows(torch.autograd.Function):
    """``rows[index]`` for an index without repeats: the gradient is copied to its places, where torch would add it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, index, grad), None


class _Taps(torch.autograd.Function):
    """[U, C] -> [U - W + 1, C], the sum of W shifted products; keeps its inputs, not the products."""

    @staticmethod
    def forward(ctx: Any, rows_UC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows_UC, weight_CW)
        wide = torch.promote_types(rows_UC.dtype, torch.float32)
        weight, taps = weight_CW.to(wide), weight_CW.shape[1]
        count = rows_UC.shape[0] - taps + 1
        total = rows_UC[:count] * weight[:, 0]
        for tap in range(1, taps):
            total.addcmul_(rows_UC[tap : tap + count].to(wide), weight[:, tap])
        if bias_C is not None:
            total += bias_C
        return total.to(rows_UC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_XC: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight_CW = ctx.saved_tensors
        wide = torch.promote_types(rows.dtype, torch.float32)
        weight, grad, taps, count = weight_CW.to(wide), grad_XC.to(wide), weight_CW.shape[1], grad_XC.shape[0]
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.zeros_like(rows, dtype=wide)
            for tap in range(taps):
                grad_rows[tap : tap + count].addcmul_(grad, weight[:, tap])
            grad_rows = grad_rows.to(rows.dtype)
        if ctx.needs_input_grad[1]:
            sums = [(rows[tap : tap + count] * grad).sum(0) for tap in range(taps)]
            grad_weight = torch.stack(sums, 1).to(weight_CW.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(weight_CW.dtype)
        return grad_rows, grad_weight, grad_bias
