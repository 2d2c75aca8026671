"""Divergences between a student's and a teacher's distributions over the vocabulary, without the full logits.

Both are weighted sums whose weights are known beforehand, as in ``ops.linear_cross_entropy``: the student's gradient
is formed in the forward. The teacher gets none. Losses that want the factor ``temperature ** 2`` (Hinton et al. 2015)
put it into the loss weights.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.ops.head_chunks import ChunkedHead
from posttrain_lib.ops.head_sum import RowLoss, weighted_row_sum
from posttrain_lib.ops.output_head import OutputHead

Divergence = Literal["forward", "reverse", "symmetric", "jensen_shannon"]


def linear_divergence(
    hidden_TD: Tensor,
    head: OutputHead,
    teacher_hidden_TE: Tensor,
    teacher_head: OutputHead,
    loss_weights_T: Tensor,
    index_N: Tensor,
    *,
    divergence: Divergence = "forward",
    mix: float = 0.5,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over positions of a divergence of the teacher's p and the student's q.

    * ``forward``: ``KL(p || q)``. ``reverse``: ``KL(q || p)``. ``symmetric``: the mean of the two (Jeffreys, halved).
    * ``jensen_shannon``: ``mix * KL(p || m) + (1 - mix) * KL(q || m)`` with ``m = mix * p + (1 - mix) * q``
      (generalised Jensen-Shannon; Agarwal et al. 2024, "On-policy distillation of language models").

    Args:
        hidden_TD: [T, D] the student's. teacher_hidden_TE: [T, E]; E need not be D.
        head, teacher_head: of one vocabulary; their padding may differ unless it is sharded.
        loss_weights_T: float [T]; only read at ``index_N``, int64 [N] of distinct positions.
        temperature: divides the logits of both. chunk_tokens: rows per logits buffer; default by device and vocabulary.

    Returns:
        (loss_sum, divergence_N): float32 scalar in nats, differentiable once in the student's hidden states, weight
        and adapter; float32 [N] per position, unweighted, detached. float64 inputs give float64.

    Raises:
        ModelError: the vocabularies or their shards differ, or the two have not the same positions.
        ConfigError: unknown divergence, or a mix outside 0 to 1.
    """
    if divergence not in get_args(Divergence):
        raise ConfigError("unknown divergence", got=divergence, expected=", ".join(get_args(Divergence)))
    if not 0.0 < mix < 1.0:
        raise ConfigError(
            "mix lies outside 0 to 1", got=mix, expected="0 < mix < 1", fix="take forward for 0, reverse for 1"
        )
    _check_vocabularies(head, teacher_head)
    if hidden_TD.shape[0] != teacher_hidden_TE.shape[0]:
        raise ModelError(
            "student and teacher have different positions",
            got=f"{hidden_TD.shape[0]} and {teacher_hidden_TE.shape[0]}",
            expected="the same packed tokens in both",
        )
    teacher = ChunkedHead(teacher_head, teacher_hidden_TE, index_N, temperature=temperature)
    return weighted_row_sum(
        _Divergence(teacher, divergence, mix),
        hidden_TD,
        head,
        loss_weights_T,
        index_N,
        chunk_tokens=chunk_tokens,
        temperature=temperature,
        buffers=2,
    )


def linear_top_divergence(
    hidden_TD: Tensor,
    head: OutputHead,
    teacher_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    loss_weights_T: Tensor,
    index_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over positions of ``KL(p || q)`` for a teacher of which only some log-probabilities are kept.

    What the teacher gives to all other tokens, ``1 - sum(exp(teacher_logprobs))``, counts as one more token, and so
    does what the student gives to them. The result is never above the full divergence, 0 only where the two agree on
    every kept token, and its gradient pulls the student's remaining mass to the teacher's without saying where in it.
    (Dropping the rest instead would leave a student unpunished for mass outside of the kept tokens, or, with p scaled
    up to 1, teach it that there is none.) A student's rest below the least normal number counts as that.

    Args:
        teacher_ids_NK: int64 [N, K], distinct in each row, of the positions ``index_N``.
        teacher_logprobs_NK: float [N, K], at the temperature that the student is to be compared at; -inf is allowed.
        temperature: divides the student's logits alone. The others: as :func:`linear_divergence`.

    Returns:
        As :func:`linear_divergence`.

    Raises:
        ConfigError: ids and log-probabilities differ in shape.
    """
    if teacher_ids_NK.shape != teacher_logprobs_NK.shape:
        raise ConfigError(
            "the teacher's ids and log-probabilities differ in shape",
            got=f"{tuple(teacher_ids_NK.shape)} and {tuple(teacher_logprobs_NK.shape)}",
            expected="one log-probability for each id",
        )
    loss = _TopDivergence(teacher_ids_NK, teacher_logprobs_NK)
    return weighted_row_sum(
        loss, hidden_TD, head, loss_weights_T, index_N, chunk_tokens=chunk_tokens, temperature=temperature
    )


class _Divergence(RowLoss):
    """:func:`linear_divergence` of a block's rows."""

    def __init__(self, teacher: ChunkedHead, divergence: Divergence, mix: float) -> None:
        self.teacher = teacher
        self.mix = mix
        self.formula = {
            "forward": self._forward,
            "reverse": self._reverse,
            "symmetric": self._symmetric,
            "jensen_shannon": self._jensen_shannon,
        }[divergence]

    def chunk(self, chunked: ChunkedHead, products_CV: Tensor, chunk: slice, wants_grad: bool) -> Tensor:
        """With the teacher's products of the chunk."""
        self.products, self.start = self.teacher.products(chunk), chunk.start
        return super().chunk(chunked, products_CV, chunk, wants_grad)

    def block(self, chunked: ChunkedHead, logits_BV: Tensor, rows: slice, wants_grad: bool) -> Tensor:
        logits, _ = self.teacher.logits(self.products[rows.start - self.start : rows.stop - self.start])
        log_p = self.teacher.log_softmax_(logits).to(logits_BV.dtype)
        return self.formula(chunked, log_p, chunked.log_softmax_(logits_BV), wants_grad)

    # Each takes log p and log q, overwrites the second with the gradient in the student's logits and returns [B].

    def _forward(self, chunked: ChunkedHead, log_p: Tensor, log_q: Tensor, wants_grad: bool) -> Tensor:
        p = log_p.exp()
        value = chunked.total(log_p.sub_(log_q).mul_(p).sum(-1))
        if wants_grad:
            log_q.exp_().sub_(p)
        return value

    def _reverse(self, chunked: ChunkedHead, log_p: Tensor, log_q: Tensor, wants_grad: bool) -> Tensor:
        ratio = torch.sub(log_q, log_p, out=log_p)
        q = log_q.exp_()
        value = chunked.total((ratio * q).sum(-1))
        if wants_grad:
            q.mul_(ratio.sub_(value[:, None]))
        return value

    def _symmetric(self, chunked: ChunkedHead, log_p: Tensor, log_q: Tensor, wants_grad: bool) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        ratio = torch.sub(log_q, log_p, out=log_p)
        backward = chunked.total((ratio * q).sum(-1))
        value = (backward - chunked.total((ratio * p).sum(-1))) / 2
        if wants_grad:
            # half of q - p, and half of what the reverse has
            torch.mul(q, ratio.sub_(backward[:, None]).add_(1), out=log_q).sub_(p).div_(2)
        return value

    def _jensen_shannon(self, chunked: ChunkedHead, log_p: Tensor, log_q: Tensor, wants_grad: bool) -> Tensor:
        log_m = torch.logaddexp(log_p + math.log(self.mix), log_q + math.log1p(-self.mix))
        of_p = chunked.total((log_p.exp() * log_p.sub_(log_m)).sum(-1))
        ratio = torch.sub(log_q, log_m, out=log_m)
        q = log_q.exp_()
        of_q = chunked.total((ratio * q).sum(-1))
        if wants_grad:
            q.mul_(ratio.sub_(of_q[:, None])).mul_(1 - self.mix)
        return self.mix * of_p + (1 - self.mix) * of_q


class _TopDivergence(RowLoss):
    """:func:`linear_top_divergence` of a block's rows."""

    def __init__(self, ids_NK: Tensor, logprobs_NK: Tensor) -> None:
        self.ids_NK, self.logprobs_NK = ids_NK, logprobs_NK

    def block(self, chunked: ChunkedHead, logits_BV: Tensor, rows: slice, wants_grad: bool) -> Tensor:
        ids, p = self.ids_NK[rows], self.logprobs_NK[rows].to(logits_BV.dtype).exp()
        p_rest = (1 - p.sum(-1, keepdim=True)).clamp_(min=0)
        kept = chunked.logits_at(logits_BV, ids)
        highest, _ = chunked.exponentials_(logits_BV)
        kept.sub_(highest)
        # The rest is summed without the kept tokens: the difference of two sums would be lost in rounding.
        columns, here = chunked.local_ids(ids)
        out = torch.zeros_like(kept)
        logits_BV.scatter_reduce_(1, columns, out if here is None else out.masked_fill(~here, math.inf), "amin")
        rest = chunked.total(logits_BV.sum(-1, keepdim=True)).clamp_(min=torch.finfo(logits_BV.dtype).tiny)
        total = rest + kept.exp().sum(-1, keepdim=True)
        log_q, log_q_rest = kept - total.log(), rest.log() - total.log()
        value = (
            (torch.xlogy(p, p) - p * log_q).sum(-1, keepdim=True) + torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest
        )
        if wants_grad:
            logits_BV.mul_(1 / total - p_rest / rest)
            chunked.add_at(logits_BV, ids, log_q.exp() - p)
        return value.squeeze(1)


def _check_vocabularies(student: OutputHead, teacher: OutputHead) -> None:
    if student.entries != teacher.entries:
        raise ModelError(
            "student and teacher have different vocabularies",
            where="output heads",
            got=f"{student.entries} and {teacher.entries} entries",
            expected="one vocabulary",
            fix="take a teacher with the student's tokenizer, or distil from its text",
        )
    parts = [(head.first, head.local_vocab_size, head.rows // head.weight_VD.shape[0]) for head in (student, teacher)]
    if parts[0] != parts[1]:
        raise ModelError(
            "student and teacher spread their vocabularies differently over the ranks",
            where="output heads",
            got=f"(first entry, entries, ranks) {parts[0]} and {parts[1]}",
            expected="the same entries on each rank",
            fix="pad both vocabularies to one size and use one tensor-parallel degree",
        )
