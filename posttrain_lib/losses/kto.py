"""KTO: a pair as one desirable and one undesirable example, each valued by itself."""

from __future__ import annotations

from torch import Tensor

from posttrain_lib.losses import pair_objectives
from posttrain_lib.losses.base import check_option
from posttrain_lib.losses.dpo import ReferenceLoss


class KTOLoss(ReferenceLoss):
    """KTO (Ethayarajh et al. 2024) on pairs; the loss of a pair is the mean of its two examples'.

    The paper measures log ratios from a baseline z, the KL between policy and reference, estimated on prompts and
    answers of a batch that do not belong together. An estimate from one micro-batch would make the gradient go by how
    rows are split, which no loss here may; so z is a number of the run file. Its default 0 is the estimate's lower
    bound and its value while policy and reference agree; APO's unpaired form has it too (D'Oosterlinck et al. 2024;
    TRL's "apo_zero_unpaired").

    Args:
        beta: > 0. baseline: z, in nats, 0 or more.
        desirable_weight, undesirable_weight: of the chosen and of the rejected, 0 or more.
    """

    def __init__(
        self,
        beta: float = 0.1,
        baseline: float = 0.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__(beta=beta)
        check_option("baseline", baseline, baseline >= 0, "0 or more")
        check_option("desirable_weight", desirable_weight, desirable_weight >= 0, "0 or more")
        check_option("undesirable_weight", undesirable_weight, undesirable_weight >= 0, "0 or more")
        self.baseline, self.weights = baseline, (desirable_weight, undesirable_weight)

    def compare(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """Of log ratios."""
        return pair_objectives.kto(chosen_P, rejected_P, self.beta, self.baseline, *self.weights)
