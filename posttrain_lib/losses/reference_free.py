"""Losses on pairs that compare the policy's own likelihoods of the two answers, without a reference."""

from __future__ import annotations

from torch import Tensor

from posttrain_lib.losses import pair_objectives
from posttrain_lib.losses.preference import PreferenceLoss


class SimPOLoss(PreferenceLoss):
    """SimPO (Meng et al. 2024): ``-log s(beta * (mean log p(chosen) - mean log p(rejected)) - target_margin)``.

    Args:
        beta: > 0. target_margin: the paper's gamma; TRL's ``simpo_gamma``. sft_weight: as in ``losses.dpo.DPOLoss``.
    """

    def __init__(self, beta: float = 2.0, target_margin: float = 1.0, sft_weight: float = 0.0) -> None:
        super().__init__(beta=beta, sft_weight=sft_weight, length_normalise=True)
        self.target_margin = target_margin

    def compare(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """Of mean log-probs per token."""
        return pair_objectives.simpo(chosen_P, rejected_P, self.beta, self.target_margin)


class ORPOLoss(PreferenceLoss):
    """ORPO (Hong et al. 2024): the chosen answer's mean ``-log p`` per token and, times ``beta``, ``-log s`` of the log
    odds ratio of the two answers' mean log-probs.

    The first term is over the answer alone, as in the paper, and a mean over pairs; TRL takes the prompt's
    tokens too, and the mean over all tokens of a batch.

    Args:
        beta: > 0, the paper's lambda.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__(beta=beta, sft_weight=1.0, length_normalise=True)

    def compare(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """Of mean log-probs per token."""
        return pair_objectives.orpo(chosen_P, rejected_P, self.beta)
