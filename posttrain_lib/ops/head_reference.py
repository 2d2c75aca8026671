"""The readable versions of the head's operations: through the full logits, differentiable everywhere, obviously right.

Same arguments and results as the operations that they are named for, but for options about chunks. Only for a whole
vocabulary: a sharded head is held against the same head in one piece.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from posttrain_lib.ops.output_head import OutputHead


def logits_reference(hidden_TD: Tensor, head: OutputHead) -> Tensor:
    """[T, entries that exist] logits."""
    weight = head.weight_VD
    if head.adapter is not None:
        weight = weight + head.adapter.scale * head.adapter.up_VR @ head.adapter.down_RD
    logits = head.scale * hidden_TD @ weight[: head.local_vocab_size].t()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def log_probabilities(hidden_TD: Tensor, head: OutputHead, temperature: float = 1.0) -> Tensor:
    """[T, entries that exist] log-probabilities."""
    return (logits_reference(hidden_TD, head) / temperature).log_softmax(-1)


def target_logits_reference(hidden_TD: Tensor, head: OutputHead, target_ids_T: Tensor, index_N: Tensor) -> Tensor:
    """logits_N of ``ops.target_logits.target_logits``."""
    return logits_reference(hidden_TD, head).gather(1, target_ids_T[:, None]).squeeze(1)[index_N]


def token_logprobs_reference(
    hidden_TD: Tensor, head: OutputHead, target_ids_T: Tensor, index_N: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(logprobs_N, entropy_N) of ``ops.linear_cross_entropy.token_logprobs``."""
    logprobs = log_probabilities(hidden_TD, head, temperature)
    picked = logprobs.gather(1, target_ids_T[:, None]).squeeze(1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return picked[index_N], entropy[index_N]


def allowed_logprobs_reference(
    hidden_TD: Tensor,
    head: OutputHead,
    target_ids_T: Tensor,
    index_N: Tensor,
    allowed_NV: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(logprobs_N, entropy_N) of ``ops.allowed_logprobs.allowed_logprobs``; ``allowed_NV`` bool, True where allowed."""
    logits = logits_reference(hidden_TD, head)[index_N] / temperature
    logprobs = logits.masked_fill(~allowed_NV, float("-inf")).log_softmax(-1)
    picked = logprobs.gather(1, target_ids_T[index_N, None]).squeeze(1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(~allowed_NV, 0)).sum(-1)
    return picked, entropy


def linear_cross_entropy_reference(
    hidden_TD: Tensor, head: OutputHead, target_ids_T: Tensor, loss_weights_T: Tensor, supervised_index_N: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss_sum, nll_N) of ``ops.linear_cross_entropy.linear_cross_entropy``."""
    picked, _ = token_logprobs_reference(hidden_TD, head, target_ids_T, supervised_index_N)
    return -(picked * loss_weights_T[supervised_index_N]).sum(), -picked.detach()


def linear_regularised_cross_entropy_reference(
    hidden_TD: Tensor,
    head: OutputHead,
    target_ids_T: Tensor,
    loss_weights_T: Tensor,
    supervised_index_N: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_bonus: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss_sum, values_N) of ``ops.head_regularised.linear_regularised_cross_entropy``."""
    logits, targets = logits_reference(hidden_TD, head)[supervised_index_N], target_ids_T[supervised_index_N]
    smoothed = cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    values = smoothed + z_loss * logits.logsumexp(-1).square() - entropy_bonus * entropy
    return (values * loss_weights_T[supervised_index_N]).sum(), values.detach()


def linear_divergence_reference(
    hidden_TD: Tensor,
    head: OutputHead,
    teacher_hidden_TE: Tensor,
    teacher_head: OutputHead,
    loss_weights_T: Tensor,
    index_N: Tensor,
    *,
    divergence: str = "forward",
    mix: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss_sum, divergence_N) of ``ops.head_divergence.linear_divergence``."""
    log_q = log_probabilities(hidden_TD, head, temperature)[index_N]
    log_p = log_probabilities(teacher_hidden_TE, teacher_head, temperature)[index_N].detach()
    p, q = log_p.exp(), log_q.exp()
    log_m = (mix * p + (1 - mix) * q).log()
    values = {
        "forward": (p * (log_p - log_q)).sum(-1),
        "reverse": (q * (log_q - log_p)).sum(-1),
        "symmetric": ((p - q) * (log_p - log_q)).sum(-1) / 2,
        "jensen_shannon": mix * (p * (log_p - log_m)).sum(-1) + (1 - mix) * (q * (log_q - log_m)).sum(-1),
    }[divergence]
    return (values * loss_weights_T[index_N]).sum(), values.detach()


def linear_top_divergence_reference(
    hidden_TD: Tensor,
    head: OutputHead,
    teacher_ids_NK: Tensor,
    teacher_logprobs_NK: Tensor,
    loss_weights_T: Tensor,
    index_N: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss_sum, divergence_N) of ``ops.head_divergence.linear_top_divergence``."""
    q = log_probabilities(hidden_TD, head, temperature)[index_N].exp().gather(1, teacher_ids_NK)
    p = teacher_logprobs_NK.exp()
    p, q = (torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1) for kept in (p, q))
    values = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
    return (values * loss_weights_T[index_N]).sum(), values.detach()
