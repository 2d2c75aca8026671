"""What a pair costs, as functions of how much likelier the policy makes each of its answers than the reference does.

Every objective here looks at a pair through two numbers: the log ratios ``log policy(y|x) - log reference(y|x)`` of the
chosen and of the rejected answer, sums over an answer's tokens (or means, see ``losses.dpo``). Each takes them as
tensors [P] with ``beta`` and ``smoothing`` and returns the loss of each pair, [P].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairObjective(Protocol):
    """(log ratios of the chosen [P], of the rejected [P], beta, share of swapped labels) -> losses [P]."""

    def __call__(self, chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor: ...


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7). With ``smoothing`` e the conservative one (Mitchell 2023):
    ``-(1 - e) log s(beta * d) - e log s(-beta * d)``, d the difference of the log ratios."""
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def robust(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): unbiased where a share e of the labels is swapped. May be negative."""
    margin = beta * (chosen - rejected)
    return (-(1 - smoothing) * logsigmoid(margin) + smoothing * logsigmoid(-margin)) / (1 - 2 * smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17): the difference of the log ratios is pulled to ``1 / (2 * beta)``."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """SLiC-HF's calibration loss (Zhao et al. 2023) on the log ratios: ``max(0, 1 - beta * d)``."""
    return torch.relu(1 - beta * (chosen - rejected))


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): chosen up and rejected down, for a chosen better than the policy."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """APO-down (eq. 8 there): both down, the rejected more, for a policy better than the chosen."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


OBJECTIVES: dict[str, PairObjective] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}

#: those that read ``smoothing``
SMOOTHED = ("sigmoid", "robust")
#: those that are defined on means over tokens; see ``losses.dpo``
OF_MEANS = ("ipo",)


def log_one_minus_exp(logprob: Tensor) -> Tensor:
    """``log(1 - exp(x))`` of x <= 0, without cancellation (Maechler 2012). x is held below minus float32's resolution:
    an answer of probability 1 would have infinite odds."""
    logprob = logprob.clamp(max=-torch.finfo(torch.float32).eps)
    near = logprob > -0.6931471805599453
    # The branch that is not taken is given a harmless number: its infinite gradient times 0 would be NaN.
    of_near = torch.log(-torch.expm1(torch.where(near, logprob, -1.0)))
    of_far = torch.log1p(-torch.exp(torch.where(near, -1.0, logprob)))
    return torch.where(near, of_near, of_far)


def simpo(chosen: Tensor, rejected: Tensor, beta: float, target_margin: float) -> Tensor:
    """SimPO (Meng et al. 2024), of mean log-probs per token [P]: ``-log s(beta * (c - r) - target_margin)``."""
    return -logsigmoid(beta * (chosen - rejected) - target_margin)


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """ORPO's odds ratio (Hong et al. 2024, eq. 7) with its weight ``beta``, of mean log-probs per token [P]."""
    log_odds = chosen - rejected - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
    return -beta * logsigmoid(log_odds)


def kto(chosen: Tensor, rejected: Tensor, beta: float, baseline: float, desirable: float, undesirable: float) -> Tensor:
    """KTO (Ethayarajh et al. 2024), of log ratios [P]: the mean of a desirable and an undesirable example."""
    of_chosen = desirable * torch.sigmoid(-beta * (chosen - baseline))
    of_rejected = undesirable * torch.sigmoid(-beta * (baseline - rejected))
    return (of_chosen + of_rejected) / 2
