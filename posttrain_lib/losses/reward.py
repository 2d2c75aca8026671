"""Reward modelling: a score for each document, trained to be higher for the chosen one of a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain_lib.errors import ModelError
from posttrain_lib.losses.base import Loss, LossOutput, check_option
from posttrain_lib.losses.preference import output_of_pairs, reward_figures
from posttrain_lib.losses.segments import pair_signals

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch


class RewardLoss(Loss):
    """Bradley-Terry (Ouyang et al. 2022, eq. 1): the mean over pairs of ``-log s(r_chosen - r_rejected - margin)``.

    A document's score r is what a head of one row says at its last token. Loss weights are not looked at. ``margin`` is
    what the data says of a pair, times ``margin_weight`` (Touvron et al. 2023, eq. 2); 0 where it says nothing.

    Args:
        margin_weight: 0 or more, units of score for one unit of the data's margin. 0: margins are not looked at.
        centre: weight, 0 or more, of ``(r_chosen + r_rejected)^2``, which keeps scores around 0 (Eisenstein et al.
            2023; TRL's ``center_rewards_coefficient``).
    """

    kind: ClassVar[Literal["document", "pair", "prompt"]] = "pair"
    figures = ("rewards/accuracy", "rewards/margin", "rewards/chosen", "rewards/rejected")

    def __init__(self, centre: float = 0.0, margin_weight: float = 0.0) -> None:
        check_option("centre", centre, centre >= 0, "0 or more")
        check_option("margin_weight", margin_weight, margin_weight >= 0, "0 or more")
        self.centre, self.margin_weight = centre, margin_weight
        self.wants_margins = margin_weight > 0

    def signals(self, batch: PackedBatch, split: str) -> dict[str, Any]:
        """The segments of the pairs, ``chosen`` and ``rejected`` int64 [P]; their ``margin``, float32 [P], as it is
        subtracted, where the loss wants it and the batch has any."""
        pairs = pair_signals(batch)
        if not self.wants_margins or batch.margins is None:
            return pairs
        said = np.nan_to_num(batch.margins[pairs["chosen"]], nan=0.0)
        return {**pairs, "margin": said * np.float32(self.margin_weight)}

    def divisor(self, batch: PackedBatch) -> float:
        """The number of pairs."""
        return float(len(pair_signals(batch)["chosen"]))

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """One forward.

        Raises:
            ModelError: the model's head has more than one row.
        """
        chosen, rejected = batch.signals["chosen"], batch.signals["rejected"]
        last = batch.cu_seqlens[1:].long() - 1

        def output(hidden_TD: Tensor, head: OutputHead) -> Tensor:
            return scores_at(torch.cat([last[chosen], last[rejected]]), hidden_TD, head)

        scores = model(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, output, prefixes=batch.prefixes
        )
        of_chosen, of_rejected = scores[: len(chosen)], scores[len(chosen) :]
        losses = -logsigmoid(of_chosen - of_rejected - batch.signals.get("margin", 0.0))
        if self.centre:
            losses = losses + self.centre * (of_chosen + of_rejected).square()
        return output_of_pairs(losses, chosen, reward_figures(of_chosen.detach(), of_rejected.detach()))


def scores_at(places_M: Tensor, hidden_TD: Tensor, head: OutputHead) -> Tensor:
    """[M] scores of a head of one row at some places, in the head's own dtype: autocast would leave them 8 bits.

    Raises:
        ModelError: the head has more than one row.
    """
    if head.rows != 1:
        raise ModelError(
            "a score is read from a head of one row",
            where="output head",
            got=f"{head.rows} rows",
            expected="1",
            fix="train the reward from a model with a score head",
        )
    with torch.autocast(hidden_TD.device.type, enabled=False):
        return head.logits(hidden_TD.index_select(0, places_M).to(head.weight_VD.dtype)).squeeze(1)
