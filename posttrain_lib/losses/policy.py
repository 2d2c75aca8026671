"""Policy gradients on packed completions: GRPO and its relatives, as one loss with options."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from posttrain_lib.errors import DataError
from posttrain_lib.losses.base import Loss, LossOutput, check_option, segments_of_tokens, weighted_figure
from posttrain_lib.losses.policy_objectives import (
    CORRECTIONS,
    KL,
    OBJECTIVES,
    Clip,
    kl_k3,
    sequence_log_ratio,
    token_log_ratio,
)
from posttrain_lib.losses.segments import check_whole_documents, supervised_counts
from posttrain_lib.ops.allowed_logprobs import allowed_logprobs
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.ops.output_head import OutputHead
    from posttrain_lib.schema.batches import PackedBatch

#: what a batch's ``signals`` may hold, float [N] each: one number a trained token
ADVANTAGES, OLD, REFERENCE, ROLLOUT = "advantages", "old_logprobs", "reference_logprobs", "rollout_logprobs"
#: what the trainer says of a token against what the sampler said: means, and the largest size of a log ratio
MISMATCH, MISMATCH_MAX = ("mismatch/kl", "mismatch/ratio", "mismatch/ratio_squared"), "mismatch/log_ratio_max"
#: a signal, 1 for tokens of answers that were drawn from the very weights that the batch's updates begin with, else 0;
#: and the KL of those tokens alone, in which no staleness is
FRESH, MISMATCH_FRESH = "fresh", "mismatch/kl_fresh"


class PolicyLoss(Loss):
    """``sum_t w_t * objective_t``, over tokens that a policy sampled.

    ``batch.signals`` has ``advantages``; ``old_logprobs``, what the policy said of the tokens before the first update
    on them (without: this is that update, and every ratio is 1); ``reference_logprobs`` with ``kl_weight``; and
    ``rollout_logprobs``, what the sampler said of them, with ``correction``.

    Figures, means over trained tokens: ``policy/clip_share``, ``policy/ratio``, ``policy/kl`` (of the policy now from
    the one that sampled, k3), and as far as asked for ``policy/reference_kl`` and ``policy/entropy``. Where the batch
    says ``rollout_logprobs``, of the trainer (before its first update on them) to the sampler: ``mismatch/kl`` (k3),
    ``mismatch/ratio``, ``mismatch/ratio_squared``, and the extreme ``mismatch/log_ratio_max``; ``mismatch/kl_fresh`` is
    over those tokens alone that ``fresh`` has 1 for, or all where the batch does not say.

    Where the batch says what its tokens were drawn from (``batch.allowed``), log-probabilities and entropies are of the
    distribution over that.

    Where nothing needs the log-probabilities before the gradient is formed (a first update, without KL, entropy,
    correction and constraint), the head does with three products in place of four; the value is then that of
    "reinforce", whose gradient is the same.

    Args:
        objective: a key of ``policy_objectives.OBJECTIVES``. ratio: of each "token", or of its whole "sequence" (GSPO).
        clip_low, clip_high, dual_clip: see ``policy_objectives.Clip``.
        aggregate: what all tokens weigh the same in: "token", the batch (DAPO); "sequence", each completion, whose
            tokens share its weight (GRPO); "constant", each completion with ``horizon`` tokens, however many it has
            (Dr. GRPO).
        kl, kl_weight: a key of ``policy_objectives.KL``, and what is added to the loss of it. kl_unbiased: each token's
            is multiplied by its ratio, gradient and all, which makes of k1 and k3 the KL's own gradient, also behind
            the first update (DeepSeek-V3.2; TRL's ``use_bias_correction_kl``). entropy_bonus: what is taken
            off of the entropy.
        temperature: that the samples were drawn at; log-probabilities are of the logits divided by it.
        correction, correction_most: a key of ``policy_objectives.CORRECTIONS`` and its bound.

    Raises:
        ConfigError: an option outside its range.
    """

    kind = "prompt"

    def __init__(
        self,
        objective: str = "clip",
        ratio: Literal["token", "sequence"] = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        aggregate: Literal["token", "sequence", "constant"] = "token",
        horizon: int | None = None,
        kl: str = "k3",
        kl_weight: float = 0.0,
        entropy_bonus: float = 0.0,
        temperature: float = 1.0,
        correction: str | None = None,
        correction_most: float = 2.0,
        kl_unbiased: bool = False,
    ) -> None:
        check_option("objective", objective, objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        check_option("ratio", ratio, ratio in ("token", "sequence"), "token or sequence")
        check_option("clip_low", clip_low, 0 <= clip_low <= 1, "0 to 1")
        check_option("clip_high", clip_high, clip_high >= 0, "0 or more")
        check_option("dual_clip", dual_clip, dual_clip is None or dual_clip > 1, "above 1")
        check_option(
            "aggregate", aggregate, aggregate in ("token", "sequence", "constant"), "token, sequence, constant"
        )
        held = (aggregate == "constant") == (horizon is not None) and (horizon is None or horizon > 0)
        check_option("horizon", horizon, held, "tokens, with aggregate: constant alone")
        check_option("kl", kl, kl in KL, f"one of {', '.join(KL)}")
        check_option("kl_weight", kl_weight, kl_weight >= 0, "0 or more")
        check_option("kl_unbiased", kl_unbiased, not kl_unbiased or kl_weight > 0, "a kl_weight above 0")
        check_option("entropy_bonus", entropy_bonus, entropy_bonus >= 0, "0 or more")
        check_option("temperature", temperature, temperature > 0, "above 0")
        known = correction is None or correction in CORRECTIONS
        check_option("correction", correction, known, f"one of {', '.join(CORRECTIONS)}")
        check_option("correction_most", correction_most, correction_most >= 1, "1 or more")
        self.objective, self.ratio, self.clip = OBJECTIVES[objective], ratio, Clip(clip_low, clip_high, dual_clip)
        self.aggregate, self.horizon, self.kl, self.kl_weight = aggregate, horizon, KL[kl], kl_weight
        self.entropy_bonus, self.correction_most, self.temperature = entropy_bonus, correction_most, temperature
        self.kl_unbiased = kl_unbiased
        self.correction = None if correction is None else CORRECTIONS[correction]
        self.figures = (
            "policy/clip_share",
            "policy/ratio",
            "policy/kl",
            *(("policy/reference_kl",) if kl_weight else ()),
            *(("policy/entropy",) if entropy_bonus else ()),
            *MISMATCH,
            MISMATCH_FRESH,
        )
        self.extremes = (MISMATCH_MAX,)

    def signals(self, batch: PackedBatch, split: str) -> dict[str, Any]:
        """What came with the batch.

        Raises:
            DataError: a signal is missing, or is not one number a trained token.
            ConfigError: whole completions count, and these lie over several ranks.
        """
        wanted = [ADVANTAGES, *([REFERENCE] if self.kl_weight else []), *([ROLLOUT] if self.correction else [])]
        for name in (*wanted, OLD):
            if name not in batch.signals and name != OLD:
                raise DataError("the batch lacks a signal", where=name, got=sorted(batch.signals), expected=wanted)
            if name in batch.signals and np.shape(batch.signals[name]) != (len(batch.supervised_index),):
                raise DataError(
                    "a signal is not one number a trained token",
                    where=name,
                    got=np.shape(batch.signals[name]),
                    expected=(len(batch.supervised_index),),
                )
        if self.ratio == "sequence" or self.aggregate != "token":
            check_whole_documents(batch)
        return dict(batch.signals)

    def divisor(self, batch: PackedBatch) -> float:
        """Trained tokens, by their weights; or completions that have some, times the horizon if there is one."""
        if self.aggregate == "token":
            return batch.weight
        segments = np.searchsorted(batch.cu_seqlens, batch.supervised_index, side="right") - 1
        return float(len(np.unique(segments)) * (self.horizon or 1))

    def __call__(self, model: Decoder, batch: PackedBatch) -> LossOutput:
        """One forward."""
        weights_N = self._weights(batch)

        def output(hidden_TD: Tensor, head: OutputHead) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            terms = self._without_logprobs if self._is_first(batch, head) else self._terms
            return terms(hidden_TD, head, batch, weights_N)

        local_sum, values_N, parts = model(
            batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen, output, prefixes=batch.prefixes
        )
        tokens_N = batch.loss_weights[batch.supervised_index]
        largest = parts.pop(MISMATCH_MAX, None)
        if largest is None or not len(largest):
            largest = tokens_N.new_zeros(1)
        figures = {name: weighted_figure(part, tokens_N) for name, part in parts.items()}
        if (kl := parts.get(MISMATCH[0])) is not None:
            fresh = batch.signals.get(FRESH)
            figures[MISMATCH_FRESH] = weighted_figure(kl, tokens_N if fresh is None else tokens_N * fresh)
        unsaid = torch.zeros(2, dtype=torch.float64, device=tokens_N.device)  # a mean of no weight is not reported
        figures = {name: figures.get(name, unsaid) for name in self.figures}
        return dataclasses.replace(
            LossOutput.of_tokens(local_sum, values_N, batch, figures), extremes={MISMATCH_MAX: largest.max().double()}
        )

    def _is_first(self, batch: PackedBatch, head: OutputHead) -> bool:
        """Whether nothing needs a log-probability before the gradient is formed. A soft cap lies between the products
        and the temperature."""
        plain = batch.allowed is None and not (self.kl_weight or self.entropy_bonus or self.correction)
        return plain and OLD not in batch.signals and (self.temperature == 1.0 or head.softcap is None)

    def _weights(self, batch: PackedBatch) -> Tensor:
        weights_N = batch.loss_weights[batch.supervised_index]
        if self.aggregate == "sequence":
            return weights_N / supervised_counts(batch)[segments_of_tokens(batch)]
        return weights_N

    def _without_logprobs(
        self, hidden_TD: Tensor, head: OutputHead, batch: PackedBatch, weights_N: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        advantages = batch.signals[ADVANTAGES].to(weights_N)
        weights_T = torch.zeros_like(batch.loss_weights).index_copy(0, batch.supervised_index, weights_N * advantages)
        head = dataclasses.replace(head, scale=head.scale / self.temperature)
        local_sum, nll_N = linear_cross_entropy(hidden_TD, head, batch.target_ids, weights_T, batch.supervised_index)
        ones = torch.ones_like(nll_N)
        figures = {"policy/clip_share": 0 * ones, "policy/ratio": ones, "policy/kl": 0 * ones}
        if ROLLOUT in batch.signals:
            figures |= mismatch_figures(-nll_N, batch.signals[ROLLOUT].to(nll_N))
        return local_sum, advantages * nll_N, figures

    def _terms(
        self, hidden_TD: Tensor, head: OutputHead, batch: PackedBatch, weights_N: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logprobs, entropy = allowed_logprobs(
            hidden_TD,
            head,
            batch.target_ids,
            batch.supervised_index,
            batch.allowed,
            temperature=self.temperature,
            with_entropy=self.entropy_bonus > 0,
        )
        signals = {name: values.to(logprobs) for name, values in batch.signals.items()}
        old = signals.get(OLD, logprobs.detach())
        values, figures = self.of_tokens(logprobs, old, signals, segments_of_tokens(batch), len(batch.document_ids))
        if entropy is not None:
            values, figures = values - self.entropy_bonus * entropy, {**figures, "policy/entropy": entropy}
        # Not a product: autocast would round both sides and their sum to 8 bits.
        return (weights_N.to(values) * values).sum(), values, figures

    def of_tokens(
        self, logprobs_N: Tensor, old_N: Tensor, signals: dict[str, Tensor], segments_N: Tensor, segments: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, figures) of each token, [N], before anything is weighed; the entropy is left out."""
        log_ratio = token_log_ratio(logprobs_N, old_N)
        used = log_ratio if self.ratio == "token" else sequence_log_ratio(logprobs_N, old_N, segments_N, segments)
        values, held = self.objective(logprobs_N, used, signals[ADVANTAGES], self.clip)
        figures = {
            "policy/clip_share": held,
            "policy/ratio": log_ratio.exp(),
            "policy/kl": kl_k3(old_N, logprobs_N),
        }
        if self.correction is not None:
            values = values * self.correction(token_log_ratio(old_N, signals[ROLLOUT]), self.correction_most)
        if ROLLOUT in signals:
            figures |= mismatch_figures(old_N, signals[ROLLOUT])
        if self.kl_weight:
            distance = self.kl(logprobs_N, signals[REFERENCE])
            distance = distance * log_ratio.exp() if self.kl_unbiased else distance
            values = values + self.kl_weight * distance
            figures["policy/reference_kl"] = distance
        return values, figures


def mismatch_figures(trainer_N: Tensor, rollout_N: Tensor) -> dict[str, Tensor]:
    """What each token says about how far the trainer's log-probabilities are from the sampler's, which should be equal:
    ``MISMATCH`` and ``MISMATCH_MAX``, [N] each. ``kl`` is k3 of the sampler from the trainer, of the sampler's samples;
    the effective sample size is the squared mean of the ratio over the mean of its square (Kong 1992)."""
    trainer_N = trainer_N.detach()
    ratio = token_log_ratio(trainer_N, rollout_N).exp()
    found = (kl_k3(rollout_N, trainer_N), ratio, ratio.square())
    return {**dict(zip(MISMATCH, found, strict=True)), MISMATCH_MAX: (trainer_N - rollout_N).abs()}
