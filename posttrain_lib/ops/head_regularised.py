"""Cross entropy with what keeps a distribution in bounds: label smoothing, z-loss, entropy bonus.

All of it is a function of a position's logits with weights known beforehand, so that, as in
``ops.linear_cross_entropy``, the gradient is formed in the forward and costs no product more. On a GPU the rows are
passed over by torch: the kernels of ``ops.head_triton`` know the plain loss alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_lib.ops.head_chunks import ChunkedHead
from posttrain_lib.ops.head_sum import RowLoss, weighted_row_sum
from posttrain_lib.ops.output_head import OutputHead


def linear_regularised_cross_entropy(
    hidden_TD: Tensor,
    head: OutputHead,
    target_ids_T: Tensor,
    loss_weights_T: Tensor,
    supervised_index_N: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_bonus: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Weighted sum over the supervised positions of

        (1 - label_smoothing) * -log p(target) + label_smoothing * mean over the vocabulary of -log p
        + z_loss * (log Z)^2 - entropy_bonus * H(p)

    with Z the sum of the exponentials of the logits and H the entropy in nats. Label smoothing: Szegedy et al. 2016, as
    in ``torch.nn.functional.cross_entropy``. z-loss: Chowdhery et al. 2022 (PaLM), section 5.

    Args: as ``ops.linear_cross_entropy.linear_cross_entropy``.

    Returns:
        (loss_sum, values_N, parts): as there, the values those of the whole sum; and of each position, float32 [N],
        unweighted, detached: ``nll``, ``log_z`` and, with an entropy bonus, ``entropy``.
    """
    rows = _Regularised(target_ids_T.index_select(0, supervised_index_N), label_smoothing, z_loss, entropy_bonus)
    loss_sum, values = weighted_row_sum(
        rows, hidden_TD, head, loss_weights_T, supervised_index_N, chunk_tokens=chunk_tokens
    )
    return loss_sum, values, {name: torch.cat([values[:0], *parts]) for name, parts in rows.parts.items()}


class _Regularised(RowLoss):
    """The function of each position's logits; ``parts`` collects, block by block, what it consists of."""

    def __init__(self, targets_N: Tensor, label_smoothing: float, z_loss: float, entropy_bonus: float) -> None:
        self.targets_N = targets_N
        self.label_smoothing, self.z_loss, self.entropy_bonus = label_smoothing, z_loss, entropy_bonus
        self.parts: dict[str, list[Tensor]] = {"nll": [], "log_z": []}
        if entropy_bonus:
            self.parts["entropy"] = []

    def block(self, chunked: ChunkedHead, logits_BV: Tensor, rows: slice, wants_grad: bool) -> Tensor:
        smoothing, entries = self.label_smoothing, chunked.head.entries
        targets = self.targets_N[rows, None]
        at_target = chunked.logits_at(logits_BV, targets)
        mean_logit = chunked.total(logits_BV.sum(-1, keepdim=True)) / entries if smoothing else 0.0
        scores = logits_BV.clone() if self.entropy_bonus else None
        log_z = chunked.softmax_(logits_BV)
        value = log_z - (1 - smoothing) * at_target - smoothing * mean_logit + self.z_loss * log_z.square()
        # d/d logit of log Z is p, of (log Z)^2 2 log Z p, and of H -p (log p + H).
        factor = 1 + 2 * self.z_loss * log_z
        if scores is not None:
            entropy = log_z - chunked.total(scores.mul(logits_BV).sum(-1, keepdim=True))
            value = value - self.entropy_bonus * entropy
            factor = scores.sub_(log_z - entropy).mul_(self.entropy_bonus).add_(factor)
            self.parts["entropy"].append(entropy.squeeze(1))
        self.parts["nll"].append((log_z - at_target).squeeze(1))
        self.parts["log_z"].append(log_z.squeeze(1))
        if wants_grad:
            logits_BV.mul_(factor).sub_(smoothing / entries)
            chunked.add_at(logits_BV, targets, torch.full_like(at_target, smoothing - 1))
        return value.squeeze(1)
