"""A weighted sum over positions of something that each position's logits give, gradients formed in the forward.

The weights are known beforehand, so a chunk's gradient is formed while its logits are there: one product for the
logits, one for the hidden states' gradient, one for the weight's. The backward only scales what is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.ops.head_chunks import ChunkedHead, HeadGradients, scaled, spread_rows
from posttrain_lib.ops.output_head import OutputHead


class RowLoss(ABC):
    """What is summed: a function of each position's logits."""

    @abstractmethod
    def block(self, chunked: ChunkedHead, logits_BV: Tensor, rows: slice, wants_grad: bool) -> Tensor:
        """The values [B] of a block, float32 or wider; ``rows`` are its places among the N.

        With ``wants_grad`` the logits are overwritten by the values' gradients in them, else by anything.
        """

    def chunk(self, chunked: ChunkedHead, products_CV: Tensor, chunk: slice, wants_grad: bool) -> Tensor:
        """The values [C] of a chunk, block by block in torch; a loss with a kernel of its own has it here.

        With ``wants_grad`` the products are overwritten by the values' gradients in them, but for the factor
        :attr:`ChunkedHead.slope`; else by anything.
        """
        values = []
        for rows in chunked.blocks(chunk):
            block = products_CV[rows.start - chunk.start : rows.stop - chunk.start]
            logits, steepness = chunked.logits(block)
            values.append(self.block(chunked, logits, rows, wants_grad))
            if wants_grad:
                chunked.put_gradient(block, logits, steepness)
        return torch.cat(values)


def weighted_row_sum(
    loss: RowLoss,
    hidden_TD: Tensor,
    head: OutputHead,
    loss_weights_T: Tensor,
    index_N: Tensor,
    *,
    chunk_tokens: int | None,
    temperature: float = 1.0,
    buffers: int = 1,
) -> tuple[Tensor, Tensor]:
    """(sum of ``loss_weights * values``, the values): a scalar, differentiable once, and [N], detached."""
    down, up = (None, None) if head.adapter is None else (head.adapter.down_RD, head.adapter.up_VR)
    inputs = (hidden_TD, head.weight_VD, down, up)
    wants_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    chunked = ChunkedHead(
        head,
        hidden_TD,
        index_N,
        chunk_tokens=chunk_tokens,
        temperature=temperature,
        buffers=buffers,
        weight_gradient=wants_grad and head.weight_VD.requires_grad,
    )
    loss_sum, values = _WeightedRowSum.apply(
        *inputs, loss_weights_T.index_select(0, index_N), index_N, chunked, loss, wants_grad
    )
    return loss_sum, values


class _WeightedRowSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        down_RD: Tensor | None,
        up_VR: Tensor | None,
        loss_weights_N: Tensor,
        index_N: Tensor,
        chunked: ChunkedHead,
        loss: RowLoss,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [needed and wants_grad for needed in ctx.needs_input_grad[:4]]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            weights_N = loss_weights_N.to(chunked.wide)
            values_N = torch.empty(chunked.count, dtype=chunked.wide, device=hidden_TD.device)
            factors_N1 = (weights_N * chunked.slope)[:, None]
            gradients = HeadGradients(chunked, factors_N1, *wanted)
            for chunk in chunked.chunks():
                products = chunked.products(chunk)
                values_N[chunk] = loss.chunk(chunked, products, chunk, any(wanted))
                if any(wanted):
                    gradients.add(chunk, products)
            gradients.reduce()
            loss_sum = torch.dot(values_N, weights_N)
        ctx.gradients = (gradients.rows_ND, gradients.weight_VD, gradients.down_RD, gradients.up_VR)
        ctx.factors, ctx.index, ctx.hidden_like = factors_N1, index_N, (hidden_TD.shape, hidden_TD.dtype)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight_VD, down_RD, up_VR)]
        ctx.mark_non_differentiable(values_N)
        return loss_sum, values_N

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _grad_values: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the head forms its gradients once: a second backward has none left")
        rows_ND, *sums = ctx.gradients
        ctx.gradients = None  # scaled in place below, and freed as early as autograd's own buffers
        hidden = None
        if rows_ND is not None:
            hidden = spread_rows(rows_ND, ctx.factors * grad_sum, ctx.index, ctx.hidden_like)
        others = [
            None if total is None else scaled(total, grad_sum, dtype)
            for total, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return hidden, *others, None, None, None, None, None
