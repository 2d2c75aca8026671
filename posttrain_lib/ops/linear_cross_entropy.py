"""Log-probabilities of target tokens from hidden states and an output head, without the full logits.

* :func:`linear_cross_entropy`: a weighted sum of negative log-likelihoods whose weights are known beforehand (SFT).
  Gradients are formed in the forward, while the logits are there: three matrix products in all.
* :func:`token_logprobs`: log-probabilities and entropies that a loss goes on computing with. The backward computes
  the logits again: four products.

Padding, logit scale, soft cap, adapter and a sharded vocabulary are the head's own (``ops.output_head``). What runs in
which dtype: ``ops.head_chunks``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from posttrain_lib.ops.head_chunks import ChunkedHead, HeadGradients, spread_rows
from posttrain_lib.ops.head_sum import RowLoss, weighted_row_sum
from posttrain_lib.ops.output_head import HeadAdapter, OutputHead


def linear_cross_entropy(
    hidden_TD: Tensor,
    head: OutputHead,
    target_ids_T: Tensor,
    loss_weights_T: Tensor,
    supervised_index_N: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of ``-log p(target)`` over the supervised positions.

    Args:
        hidden_TD: [T, D], any float dtype. head: the output head.
        target_ids_T: int64 [T]. loss_weights_T: float [T]; only read at the supervised positions.
        supervised_index_N: int64 [N], distinct positions that count. N may be 0: the result is then a zero that
            still belongs to the graph, so that every rank takes part in the backward.
        chunk_tokens: rows per logits buffer; default by device and vocabulary.

    Returns:
        (loss_sum, nll_N): float32 scalar, differentiable once in the hidden states, the head's weight and its adapter
        (a second backward through the same graph raises RuntimeError); float32 [N] per position, unweighted,
        detached. float64 inputs give float64.
    """
    return weighted_row_sum(
        _NegativeLogLikelihood(target_ids_T.index_select(0, supervised_index_N)),
        hidden_TD,
        head,
        loss_weights_T,
        supervised_index_N,
        chunk_tokens=chunk_tokens,
    )


def token_logprobs(
    hidden_TD: Tensor,
    head: OutputHead,
    target_ids_T: Tensor,
    index_N: Tensor,
    *,
    chunk_tokens: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Differentiable log-probabilities of the targets, and entropies, at the positions ``index_N``.

    Args: as :func:`linear_cross_entropy`; ``temperature`` divides the logits; ``with_entropy`` asks for the second
        result.

    Returns:
        (logprobs_N, entropy_N or None), float32 [N] each (float64 for float64 inputs), differentiable in the hidden
        states, the head's weight and its adapter.
    """
    down, up = (None, None) if head.adapter is None else (head.adapter.down_RD, head.adapter.up_VR)
    chunked = ChunkedHead(head, hidden_TD, index_N, chunk_tokens=chunk_tokens, temperature=temperature)
    targets_N = target_ids_T.index_select(0, index_N)
    logprobs, entropy = _TokenLogprobs.apply(
        hidden_TD, head.weight_VD, down, up, targets_N, index_N, chunked, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _NegativeLogLikelihood(RowLoss):
    """``-log p(target)`` of each row."""

    def __init__(self, targets_N: Tensor) -> None:
        self.targets_N = targets_N

    def chunk(self, chunked: ChunkedHead, products_CV: Tensor, chunk: slice, wants_grad: bool) -> Tensor:
        """In one kernel where there is one."""
        if not chunked.kernels:
            return super().chunk(chunked, products_CV, chunk, wants_grad)
        from posttrain_lib.ops.head_triton import row_statistics

        entries, curve = chunked.head.local_vocab_size, chunked.curve
        _, logprobs, _ = row_statistics(products_CV, self.targets_N[chunk], entries, curve, with_gradient=wants_grad)
        return logprobs.neg_()

    def block(self, chunked: ChunkedHead, logits_BV: Tensor, rows: slice, wants_grad: bool) -> Tensor:
        targets = self.targets_N[rows, None]
        at_target = chunked.logits_at(logits_BV, targets)
        log_total = chunked.softmax_(logits_BV)
        if wants_grad:
            chunked.add_at(logits_BV, targets, torch.full_like(at_target, -1))
        return (log_total - at_target).squeeze(1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        down_RD: Tensor | None,
        up_VR: Tensor | None,
        targets_N: Tensor,
        index_N: Tensor,
        chunked: ChunkedHead,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            log_total_N = torch.empty(chunked.count, dtype=chunked.wide, device=hidden_TD.device)
            logprobs, entropy = torch.empty_like(log_total_N), torch.empty_like(log_total_N)
            for chunk in chunked.chunks():
                statistics = _statistics(chunked, chunked.products(chunk), chunk, targets_N, with_entropy)
                log_total_N[chunk], logprobs[chunk], entropy[chunk] = statistics
        ctx.save_for_backward(hidden_TD, weight_VD, down_RD, up_VR, targets_N, index_N, log_total_N, entropy)
        # The backward runs outside the caller's autocast: remember what this forward computed in. Tensors come from
        # autograd, which notices where one was changed in between.
        ctx.head = chunked.head
        ctx.options = {
            "chunk_tokens": chunked.chunk_tokens,
            "temperature": chunked.temperature,
            "dtype": chunked.dtype,
        }
        ctx.with_entropy = with_entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, down_RD, up_VR, targets_N, index_N, log_total_N, entropy_N = ctx.saved_tensors
        adapter = None if down_RD is None else HeadAdapter(down_RD, up_VR, ctx.head.adapter.scale)
        head = dataclasses.replace(ctx.head, weight_VD=weight_VD, adapter=adapter)
        of_entropy = (entropy_N, grad_entropy) if ctx.with_entropy else None
        with torch.autocast(hidden_TD.device.type, enabled=False):
            chunked = ChunkedHead(head, hidden_TD, index_N, weight_gradient=ctx.needs_input_grad[1], **ctx.options)
            gradients = HeadGradients(chunked, chunked.slope, *ctx.needs_input_grad[:4])
            for chunk in chunked.chunks():
                products = chunked.products(chunk)
                _put_gradient(chunked, products, chunk, targets_N, log_total_N, grad_logprobs, of_entropy)
                gradients.add(chunk, products)
            gradients.reduce()
        hidden = None
        if gradients.rows_ND is not None:
            like = (hidden_TD.shape, hidden_TD.dtype)
            hidden = spread_rows(gradients.rows_ND, gradients.factors_N1, index_N, like)
        parts = ((gradients.weight_VD, weight_VD), (gradients.down_RD, down_RD), (gradients.up_VR, up_VR))
        others = [None if total is None else total.to(like.dtype) for total, like in parts]
        return hidden, *others, None, None, None, None


def _statistics(
    chunked: ChunkedHead, products_CV: Tensor, chunk: slice, targets_N: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp, log-probability of the target, entropy) [C] of a chunk's rows; the last is 0 if not asked for."""
    if chunked.kernels:
        from posttrain_lib.ops.head_triton import row_statistics

        entries, curve = chunked.head.local_vocab_size, chunked.curve
        return row_statistics(products_CV, targets_N[chunk], entries, curve, with_entropy=with_entropy)
    results = torch.zeros(3, chunk.stop - chunk.start, 1, dtype=chunked.wide, device=products_CV.device)
    for rows in chunked.blocks(chunk):
        here = slice(rows.start - chunk.start, rows.stop - chunk.start)
        log_total, logprob, entropy = results[:, here]
        logits, _ = chunked.logits(products_CV[here])
        at_target = chunked.logits_at(logits, targets_N[rows, None])
        scores = logits.clone() if with_entropy else None
        log_total.copy_(chunked.softmax_(logits))
        torch.sub(at_target, log_total, out=logprob)
        if scores is not None:
            mean = chunked.total(scores.mul_(logits).sum(-1, keepdim=True))
            torch.sub(log_total, mean, out=entropy)
    log_totals, logprobs, entropies = results.squeeze(2)
    return log_totals, logprobs, entropies


def _put_gradient(
    chunked: ChunkedHead,
    products_CV: Tensor,
    chunk: slice,
    targets_N: Tensor,
    log_total_N: Tensor,
    pulls_N: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None,
) -> None:
    """Overwrite a chunk's products with the gradient of ``pull * log p(target) + entropy_pull * entropy`` in them.

    ``of_entropy``: (entropy, entropy_pull), [N] each. The factor :attr:`ChunkedHead.slope` is left out.
    """
    if chunked.kernels:
        from posttrain_lib.ops import head_triton

        per_row = (targets_N, log_total_N, pulls_N, *(of_entropy or ()))
        targets, log_totals, pulls, *entropies = (values[chunk] for values in per_row)
        entries = chunked.head.local_vocab_size
        head_triton.put_gradient(products_CV, targets, entries, chunked.curve, log_totals, pulls, *entropies)
        return
    for rows in chunked.blocks(chunk):
        block = products_CV[rows.start - chunk.start : rows.stop - chunk.start]
        logits, steepness = chunked.logits(block)
        # d logprob / d logit = (1 at the target) - p; d entropy / d logit = -p (log p + entropy)
        logs, pull = logits.sub_(log_total_N[rows, None]), pulls_N[rows, None]
        if of_entropy is not None:
            entropy, entropy_pull = (values[rows, None] for values in of_entropy)
            factors = (logs + entropy).mul_(entropy_pull).add_(pull).neg_()
            logits.exp_().mul_(factors)
        else:
            logits.exp_().mul_(-pull)
        chunked.add_at(logits, targets_N[rows, None], pull)
        chunked.put_gradient(block, logits, steepness)
