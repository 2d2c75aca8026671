"""The output head as one operation: hidden states and head weight in, per-token log-probabilities out.

The full ``[tokens, vocabulary]`` tensor is never built. Supervised rows are picked out first, then chunks of them go
through one logits buffer. Two operations share the chunk code:

* :func:`linear_cross_entropy`: a weighted sum of negative log-likelihoods whose weights are known beforehand (SFT).
  Gradients are formed in the forward, while the logits are there: three matrix products in all.
* :func:`token_logprobs`: log-probabilities and entropies that a loss goes on computing with. The backward computes
  the logits again: four products.

Under autocast the products run in its dtype; log-sum-exp, softmax and the weight gradient's sum are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Rows per chunk: enough for the products to run at full rate. The byte bound keeps large vocabularies in check:
# at 152k entries it means 441 rows.
_CHUNK_ROWS = {"cpu": 1024}
_CHUNK_ROWS_ELSEWHERE = 4096
_CHUNK_BYTES = {"cpu": 256 << 20}
_CHUNK_BYTES_ELSEWHERE = 2 << 30
_LEAST_ROWS = 64


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    loss_weights_T: Tensor,
    supervised_index_N: Tensor,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of ``-log p(target)`` over the supervised positions.

    Args:
        hidden_TD: [T, D], any float dtype. weight_VD: [V, D] output head.
        target_ids_T: int64 [T]. loss_weights_T: float [T]; only read at the supervised positions.
        supervised_index_N: int64 [N], distinct positions that count. N may be 0: the result is then a zero that
            still belongs to the graph, so that every rank takes part in the backward.
        chunk_tokens: rows per logits buffer; default by device and vocabulary.
        vocab_size: entries that exist; columns from there to V are padding, with probability 0.

    Returns:
        (loss_sum, nll_N): float32 scalar, differentiable once in hidden and weight (a second backward through the
        same graph raises); float32 [N] per position, unweighted, detached. float64 inputs give float64.
    """
    wants_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    loss_sum, nll = _LinearCrossEntropy.apply(
        hidden_TD,
        weight_VD,
        target_ids_T.index_select(0, supervised_index_N),
        loss_weights_T.index_select(0, supervised_index_N),
        supervised_index_N,
        chunk_tokens,
        vocab_size,
        wants_grad,
    )
    return loss_sum, nll


def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    index_N: Tensor,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Differentiable log-probabilities of the targets, and entropies, at the positions ``index_N``.

    Args: as :func:`linear_cross_entropy`; ``temperature`` divides the logits; ``with_entropy`` asks for the second
        result.

    Returns:
        (logprobs_N, entropy_N or None), float32 [N] each (float64 for float64 inputs).
    """
    logprobs, entropy = _TokenLogprobs.apply(
        hidden_TD,
        weight_VD,
        target_ids_T.index_select(0, index_N),
        index_N,
        chunk_tokens,
        vocab_size,
        float(temperature),
        with_entropy,
    )
    return logprobs, entropy if with_entropy else None


class _Head:
    """The chunk code: one logits buffer, one product per chunk, softmax statistics in float32 or wider."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, chunk_tokens: int | None, vocab_size: int | None) -> None:
        device = hidden_TD.device
        self.dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else torch.promote_types(hidden_TD.dtype, weight_VD.dtype)
        )
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.weight = weight_VD.to(self.dtype)
        entries = weight_VD.shape[0]
        self.vocab_size = entries if vocab_size is None else vocab_size
        if not 0 < self.vocab_size <= entries:
            raise ValueError(f"vocab_size {vocab_size} is not within the head's {entries} rows")
        self.rows = chunk_tokens or _default_rows(device.type, entries)
        self._buffer: Tensor | None = None

    def chunks(self, count: int) -> Iterator[slice]:
        """Slices of the compacted rows."""
        return (slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows))

    def logits(self, rows_CD: Tensor) -> Tensor:
        """[C, V] logits of a chunk in the wide dtype, padding at -inf. Overwritten by the next call."""
        if self._buffer is None:
            shape = (min(self.rows, rows_CD.shape[0]), self.weight.shape[0])
            self._buffer = torch.empty(shape, dtype=self.wide, device=rows_CD.device)
        logits = self._buffer[: rows_CD.shape[0]]
        if self.dtype == self.wide:
            torch.mm(rows_CD, self.weight.t(), out=logits)
        else:
            logits.copy_(torch.mm(rows_CD, self.weight.t()))
        if self.vocab_size < logits.shape[1]:
            logits[:, self.vocab_size :] = float("-inf")
        return logits


def _default_rows(device: str, entries: int) -> int:
    rows = _CHUNK_ROWS.get(device, _CHUNK_ROWS_ELSEWHERE)
    fitting = _CHUNK_BYTES.get(device, _CHUNK_BYTES_ELSEWHERE) // (4 * entries)
    return max(_LEAST_ROWS, min(rows, fitting))


def _softmax_(logits_CV: Tensor) -> Tensor:
    """Turn logits into probabilities in place; returns the log-sum-exp [C]."""
    highest = logits_CV.amax(dim=-1, keepdim=True)
    logits_CV.sub_(highest).exp_()
    total = logits_CV.sum(dim=-1, keepdim=True)
    logits_CV.div_(total)
    return (highest + total.log()).squeeze(-1)


def _accumulate_(grad_VD: Tensor, grad_logits_CV: Tensor, rows_CD: Tensor, first: bool) -> None:
    """grad += grad_logits^T rows, summed in the wide dtype of ``grad``."""
    if grad_logits_CV.dtype == grad_VD.dtype:
        if first:
            torch.mm(grad_logits_CV.t(), rows_CD, out=grad_VD)
        else:
            torch.addmm(grad_VD, grad_logits_CV.t(), rows_CD, out=grad_VD)
    elif first:
        grad_VD.copy_(torch.mm(grad_logits_CV.t(), rows_CD))
    else:
        grad_VD.add_(torch.mm(grad_logits_CV.t(), rows_CD))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        loss_weights_N: Tensor,
        index_N: Tensor,
        chunk_tokens: int | None,
        vocab_size: int | None,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden_TD, weight_VD, chunk_tokens, vocab_size)
        count = index_N.shape[0]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            rows_ND = hidden_TD.index_select(0, index_N).to(head.dtype)
            weights_N = loss_weights_N.to(head.wide)
            nll_N = torch.empty(count, dtype=head.wide, device=hidden_TD.device)
            grad_rows = torch.empty_like(rows_ND) if wants_grad and ctx.needs_input_grad[0] else None
            grad_weight = None
            if wants_grad and ctx.needs_input_grad[1]:
                grad_weight = torch.empty(weight_VD.shape, dtype=head.wide, device=weight_VD.device)
                if count == 0:
                    grad_weight.zero_()
            for part in head.chunks(count):
                rows, targets = rows_ND[part], targets_N[part, None]
                logits = head.logits(rows)
                at_target = logits.gather(1, targets).squeeze(1)
                nll_N[part] = _softmax_(logits) - at_target
                if grad_rows is None and grad_weight is None:
                    continue
                # The loss weight is a factor of a row: it goes into the narrow side of each product.
                weights = weights_N[part, None].to(head.dtype)
                grad_logits = logits.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=head.wide))
                grad_logits = grad_logits.to(head.dtype)
                if grad_rows is not None:
                    torch.mm(grad_logits, head.weight, out=grad_rows[part]).mul_(weights)
                if grad_weight is not None:
                    _accumulate_(grad_weight, grad_logits, rows * weights, first=part.start == 0)
            ctx.gradients = (grad_rows, grad_weight)
            ctx.index = index_N
            ctx.hidden_like, ctx.weight_dtype = (hidden_TD.shape, hidden_TD.dtype), weight_VD.dtype
            loss_sum = torch.dot(nll_N, weights_N)
        ctx.mark_non_differentiable(nll_N)
        return loss_sum, nll_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy forms its gradients once: a second backward has none left")
        grad_rows, grad_weight = ctx.gradients
        ctx.gradients = None  # scaled in place below, and freed as early as autograd's own buffers
        grad_hidden = None
        if grad_rows is not None:
            shape, dtype = ctx.hidden_like
            grad_hidden = torch.zeros(shape, dtype=dtype, device=grad_rows.device)
            grad_hidden.index_copy_(0, ctx.index, grad_rows.mul_(grad_loss.to(grad_rows.dtype)).to(dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        index_N: Tensor,
        chunk_tokens: int | None,
        vocab_size: int | None,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden_TD, weight_VD, chunk_tokens, vocab_size)
        count = index_N.shape[0]
        with torch.autocast(hidden_TD.device.type, enabled=False):
            rows_ND = hidden_TD.index_select(0, index_N).to(head.dtype)
            logprobs = torch.empty(count, dtype=head.wide, device=hidden_TD.device)
            entropy = torch.zeros_like(logprobs)
            for part in head.chunks(count):
                logits = head.logits(rows_ND[part])
                if temperature != 1.0:
                    logits.div_(temperature)
                at_target = logits.gather(1, targets_N[part, None]).squeeze(1)
                if with_entropy:
                    scores = logits[:, : head.vocab_size].clone()
                    log_total = _softmax_(logits)
                    entropy[part] = log_total - (logits[:, : head.vocab_size] * scores).sum(-1)
                else:
                    log_total = _softmax_(logits)
                logprobs[part] = at_target - log_total
        ctx.save_for_backward(hidden_TD, weight_VD, targets_N, index_N)
        # The backward runs outside the caller's autocast: remember what this forward computed in.
        ctx.options = (head.rows, head.vocab_size, temperature, with_entropy, head.dtype)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_N, index_N = ctx.saved_tensors
        chunk_rows, vocab_size, temperature, with_entropy, dtype = ctx.options
        device = hidden_TD.device
        with torch.autocast(device.type, enabled=False):
            rows_ND = hidden_TD.index_select(0, index_N).to(dtype)
            head = _Head(rows_ND, weight_VD.to(dtype), chunk_rows, vocab_size)
            grad_rows = torch.empty_like(rows_ND) if ctx.needs_input_grad[0] else None
            grad_weight = None
            if ctx.needs_input_grad[1]:
                grad_weight = torch.zeros(weight_VD.shape, dtype=head.wide, device=device)
            for part in head.chunks(index_N.shape[0]):
                targets, grads = targets_N[part, None], grad_logprobs[part, None].to(head.wide)
                probabilities = head.logits(rows_ND[part])
                if temperature != 1.0:
                    probabilities.div_(temperature)
                _softmax_(probabilities)
                if with_entropy:
                    # d entropy / d logit = -p (log p + entropy); p log p is 0 where p is 0
                    logs = torch.xlogy(probabilities, probabilities)
                    entropy = -logs.sum(-1, keepdim=True)
                    pull = (logs + probabilities * entropy).mul_(grad_entropy[part, None].to(head.wide))
                    grad_logits = probabilities.mul_(-grads).sub_(pull)
                else:
                    grad_logits = probabilities.mul_(-grads)
                grad_logits = grad_logits.scatter_add_(1, targets, grads).div_(temperature).to(dtype)
                if grad_rows is not None:
                    torch.mm(grad_logits, head.weight, out=grad_rows[part])
                if grad_weight is not None:
                    _accumulate_(grad_weight, grad_logits, rows_ND[part], first=part.start == 0)
            grad_hidden = None
            if grad_rows is not None:
                grad_hidden = torch.zeros_like(hidden_TD).index_copy_(0, index_N, grad_rows.to(hidden_TD.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None
