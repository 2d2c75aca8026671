"""Direct preference optimisation: a policy compared with a frozen reference on pairs of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from posttrain_lib.errors import ConfigError
from posttrain_lib.losses.base import check_option
from posttrain_lib.losses.pair_objectives import OBJECTIVES, OF_MEANS, SMOOTHED
from posttrain_lib.losses.preference import FIGURES, PreferenceLoss, document_logprobs

if TYPE_CHECKING:
    from posttrain_lib.losses.beside import Beside
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.schema.batches import PackedBatch

#: the column of a table of stored signals, by example: the reference's summed log-probability of the document
REFERENCE_COLUMN = "logprob"


class ReferenceLoss(PreferenceLoss):
    """A loss on pairs that takes a reference's log-probabilities off the policy's: stored ones where there are tables
    (column ``logprob`` by example), else those of the frozen model, run on each batch.

    The figure ``kl`` is the mean over the documents of ``log policy - log reference``. It would estimate
    ``KL(policy || reference)`` of answers that the policy wrote; of a data set's answers it says how far the policy has
    moved on them, and may be negative.
    """

    needs = "reference"
    figures = (*FIGURES, "kl")

    def attach(self, beside: Beside) -> None:
        """Take the reference, as a model or as tables."""
        self.beside = beside

    def signals(self, batch: PackedBatch, split: str) -> dict[str, Any]:
        """The pairs, and ``reference`` float [n] where it is stored.

        Raises:
            ConfigError: nothing is stored for this split, or no log-probabilities.
        """
        found = super().signals(batch, split)
        tables = self.beside.tables if self.beside is not None else {}
        if not tables:
            return found
        column = tables[split].of_segments(batch).get(REFERENCE_COLUMN) if split in tables else None
        if column is None:
            raise ConfigError(
                "the reference's log-probabilities are not stored",
                where=f"stored signals of the split {split}",
                got=f"splits {sorted(tables)}",
                expected=f"a column {REFERENCE_COLUMN} by example for each split",
                fix="make the signals of both splits, or run the reference during training",
            )
        return {**found, "reference": column}

    def reference_logprobs(self, model: Decoder, batch: PackedBatch) -> Tensor:
        """Float64 [n].

        Raises:
            ConfigError: no reference was attached.
        """
        if "reference" in batch.signals:
            return batch.signals["reference"].double()
        if self.beside is None:
            raise ConfigError(
                f"{type(self).__name__} compares with a reference and has none",
                fix="call attach() before the first step",
            )
        found: Tensor = self.beside.run(model, batch, document_logprobs(batch))
        return found


class DPOLoss(ReferenceLoss):
    """DPO and its relatives, see ``losses.pair_objectives``.

    Args:
        variant: a key of ``pair_objectives.OBJECTIVES``.
        beta: > 0, how dear it is to leave the reference. For "ipo" it is the paper's tau.
        label_smoothing: share of the labels that are taken to be swapped, 0 to below 0.5; for "sigmoid" and "robust".
        sft_weight: weight of the chosen answer's mean ``-log p`` per token, as in iterative RPO (Pang et al. 2024).
            TRL's loss type "sft" is the mean over all chosen tokens of a batch, which would weigh pairs by length.
        length_normalise: compare means over tokens in place of sums. None: as the variant has it, means for "ipo" (not
            said in the paper; TRL does so too, and quotes its authors), sums for all others. "sigmoid" with True is
            TRL's "sigmoid_norm".

    Raises:
        ConfigError: an unknown variant, or an option outside its range.
    """

    def __init__(
        self,
        variant: str = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        length_normalise: bool | None = None,
    ) -> None:
        check_option("variant", variant, variant in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        check_option("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "0 to below 0.5")
        smoothed = label_smoothing == 0 or variant in SMOOTHED
        check_option("label_smoothing", label_smoothing, smoothed, f"0, or a variant of {', '.join(SMOOTHED)}")
        means = variant in OF_MEANS if length_normalise is None else length_normalise
        super().__init__(beta=beta, sft_weight=sft_weight, length_normalise=means)
        self.objective, self.label_smoothing = OBJECTIVES[variant], label_smoothing

    def compare(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """By the variant."""
        return self.objective(chosen_P, rejected_P, self.beta, self.label_smoothing)
