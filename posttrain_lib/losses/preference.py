"""What the losses on pairs share: log-probabilities of whole answers, an SFT term, and figures."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain_lib.losses.base import Loss, LossOutput, check_option, weighted_figure
from posttrain_lib.losses.segments import segment_sums, supervised_counts, trained_pairs
from posttrain_lib.ops.linear_cross_entropy import token_logprobs

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch

#: the first two are shown on the terminal
FIGURES = ("rewards/accuracy", "rewards/margin", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


class PreferenceLoss(Loss):
    """Mean over the pairs of :meth:`compare`, plus ``sft_weight`` times the chosen answer's mean ``-log p`` per token.

    A document's *score* is its log-probability, summed over its supervised tokens in float64 (weights other than 0
    count as 1), minus :meth:`reference_logprobs`; with ``length_normalise`` divided by the number of those tokens. A
    pair of which neither document has a supervised token counts nowhere.

    Figures, means over pairs: ``rewards/*`` are ``beta`` times the scores, ``rewards/accuracy`` the share of pairs
    whose chosen document has the higher one (a tie counts as wrong), ``logps/*`` the policy's log-probabilities of the
    documents, always sums.

    Args:
        beta: > 0. sft_weight: >= 0.
    """

    kind: ClassVar[Literal["document", "pair", "prompt"]] = "pair"
    figures: tuple[str, ...] = FIGURES

    def __init__(self, *, beta: float, sft_weight: float = 0.0, length_normalise: bool = False) -> None:
        check_option("beta", beta, beta > 0, "above 0")
        check_option("sft_weight", sft_weight, sft_weight >= 0, "0 or more")
        self.beta, self.sft_weight, self.length_normalise = beta, sft_weight, length_normalise

    def signals(self, batch: PackedBatch, split: str) -> dict[str, Any]:
        """The segments of the pairs, ``chosen`` and ``rejected`` int64 [P]."""
        return trained_pairs(batch)

    def divisor(self, batch: PackedBatch) -> float:
        """The number of pairs."""
        return float(len(trained_pairs(batch)["chosen"]))

    @abstractmethod
    def compare(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """The losses [P] of pairs with these scores."""

    def reference_logprobs(self, model: Decoder, batch: PackedBatch) -> Tensor | None:
        """What is taken off the documents' log-probabilities, [n]; None: nothing."""
        return None

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """One forward of the model, after one of the reference where that runs."""
        reference_n = self.reference_logprobs(model, batch)
        logprobs_n = model(
            batch.token_ids,
            batch.positions,
            batch.cu_seqlens,
            batch.max_seqlen,
            document_logprobs(batch),
            prefixes=batch.prefixes,
        )
        counts_n = supervised_counts(batch).clamp(min=1).to(logprobs_n.dtype)
        ratios_n = logprobs_n if reference_n is None else logprobs_n - reference_n
        scores_n = ratios_n / counts_n if self.length_normalise else ratios_n
        chosen, rejected = batch.signals["chosen"], batch.signals["rejected"]
        losses_P = self.compare(scores_n[chosen], scores_n[rejected])
        if self.sft_weight:
            losses_P = losses_P - self.sft_weight * (logprobs_n / counts_n)[chosen]
        rewards_n, logprobs_n, ratios_n = (self.beta * scores_n).detach(), logprobs_n.detach(), ratios_n.detach()
        values = {
            **reward_figures(rewards_n[chosen], rewards_n[rejected]),
            "logps/chosen": logprobs_n[chosen],
            "logps/rejected": logprobs_n[rejected],
            "kl": torch.cat([ratios_n[chosen], ratios_n[rejected]]),
        }
        return output_of_pairs(losses_P, chosen, {name: values[name] for name in self.figures})


def document_logprobs(batch: PackedBatch) -> Any:
    """An output for a decoder's forward: float64 [n], the log-probability of each segment's supervised tokens."""

    def output(hidden_TD: Tensor, head: OutputHead) -> Tensor:
        logprobs_N, _ = token_logprobs(hidden_TD, head, batch.target_ids, batch.supervised_index)
        # The losses look at differences of sums over whole documents, which float32 would round to 1e-4 and worse.
        return segment_sums(logprobs_N.double(), batch)

    return output


def reward_figures(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    """The figures ``rewards/*`` of each pair, from its two rewards (detached)."""
    return {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margin": chosen_P - rejected_P,
        "rewards/accuracy": (chosen_P > rejected_P).double(),
    }


def output_of_pairs(losses_P: Tensor, chosen_P: Tensor, values: dict[str, Tensor]) -> LossOutput:
    """An output whose items are the pairs, each with weight 1 and at the segment of its chosen document; the figures
    are the means of ``values``."""
    values_P = losses_P.detach()
    figures = {name: weighted_figure(value, torch.ones_like(value)) for name, value in values.items()}
    return LossOutput(losses_P.sum(), values_P, torch.ones_like(values_P), chosen_P, figures)
