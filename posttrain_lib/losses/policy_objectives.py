"""What a policy gradient sees of a token: how far the policy has moved since the token was sampled, and what it gains.

All functions take and give one entry for each trained token, [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: bound on the log of a ratio: e^20 is far beyond every clip, and finite in float32
_MOST = 20.0


@dataclass(frozen=True)
class Clip:
    """How far a ratio may count: from ``1 - low`` to ``1 + high``; ``dual``: at most so much of a negative advantage
    (Ye et al. 2020), None for no such bound."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def bounded(self, ratio_N: Tensor) -> Tensor:
        """The ratio within the bounds."""
        return ratio_N.clamp(1 - self.low, 1 + self.high)


#: (loss, whether the clip holds the token back) of each token, from log pi, log ratio, advantage
Objective = Callable[[Tensor, Tensor, Tensor, Clip], tuple[Tensor, Tensor]]


def clipped(logprobs_N: Tensor, log_ratio_N: Tensor, advantages_N: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """``-min(r A, clip(r) A)``: proximal policy optimisation (Schulman et al. 2017), with DAPO's two bounds."""
    ratio = log_ratio_N.exp()
    free, held = -advantages_N * ratio, -advantages_N * clip.bounded(ratio)
    loss = torch.maximum(free, held)
    if clip.dual is not None:
        loss = torch.where(advantages_N < 0, torch.minimum(loss, -advantages_N * clip.dual), loss)
    return loss, loss != free


def cispo(logprobs_N: Tensor, log_ratio_N: Tensor, advantages_N: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """``-clip(r) A log pi`` with the ratio a constant: every token keeps a gradient (MiniMax 2025)."""
    ratio = log_ratio_N.detach().exp()
    bounded = clip.bounded(ratio)
    return -bounded * advantages_N * logprobs_N, bounded != ratio


def reinforce(logprobs_N: Tensor, log_ratio_N: Tensor, advantages_N: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """``-A log pi``: the policy gradient itself (Williams 1992), of samples of this policy."""
    return -advantages_N * logprobs_N, torch.zeros_like(advantages_N, dtype=torch.bool)


OBJECTIVES: dict[str, Objective] = {"clip": clipped, "cispo": cispo, "reinforce": reinforce}


def token_log_ratio(logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """``log pi - log pi_old`` of each token, within the bounds of float32's exponential."""
    return (logprobs_N - old_logprobs_N).clamp(-_MOST, _MOST)


def sequence_log_ratio(logprobs_N: Tensor, old_logprobs_N: Tensor, segments_N: Tensor, segments: int) -> Tensor:
    """The mean log ratio of the token's whole completion, the gradient going through the token's own log pi (GSPO,
    Zheng et al. 2025, equation 14)."""
    means_n = _means(logprobs_N.detach() - old_logprobs_N, segments_N, segments)
    return (logprobs_N - logprobs_N.detach() + means_n[segments_N]).clamp(-_MOST, _MOST)


def _means(values_N: Tensor, segments_N: Tensor, segments: int) -> Tensor:
    sums, counts = values_N.new_zeros(segments), values_N.new_zeros(segments)
    sums = sums.index_add(0, segments_N, values_N)
    counts = counts.index_add(0, segments_N, torch.ones_like(values_N))
    return sums / counts.clamp(min=1)


def kl_k1(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """``log pi - log ref``: unbiased in value; its own gradient is not that of the KL (Schulman 2020)."""
    return logprobs_N - reference_N


def kl_k2(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """Half its square: the gradient is that of the KL, of samples of the policy."""
    return 0.5 * (logprobs_N - reference_N).square()


def kl_k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """``ref / pi - 1 - log(ref / pi)``: unbiased and never negative (GRPO's own)."""
    # No bound below, where nothing overflows: what the reference would hardly say has the largest pull of all.
    difference = (reference_N - logprobs_N).clamp(max=_MOST)
    # Beside a 1, float32 loses what is left of a small difference, and its sign.
    return torch.expm1(difference) - difference


KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def truncated(log_ratio_N: Tensor, most: float) -> Tensor:
    """``min(r, most)`` of trainer over sampler: truncated importance sampling (Ionides 2008)."""
    return log_ratio_N.exp().clamp(max=most)


def masked(log_ratio_N: Tensor, most: float) -> Tensor:
    """``r`` where trainer and sampler agree within a factor of ``most``, else 0 (IcePop, Ling 2025)."""
    ratio = log_ratio_N.exp()
    return ratio * ((ratio <= most) & (ratio >= 1 / most))


CORRECTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {"truncate": truncated, "mask": masked}
