"""Advantages and policy losses by verl's own names, from its registries (``verl.trainer.ppo.core_algos``).

What does not mean here what it means in verl is refused, by what it needs or by what it does with a few numbers, so
that an algorithm registered by somebody else is judged as verl's own are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

from posttrain_lib.errors import ConfigError
from posttrain_lib.losses.base import check_option
from posttrain_lib.losses.policy import ADVANTAGES, ROLLOUT, PolicyLoss, mismatch_figures
from posttrain_lib.losses.policy_objectives import kl_k3, token_log_ratio
from posttrain_lib.rl.advantages import Floats, Integers, Rule

#: what an estimator of outcomes may ask for
_OUTCOME = {"token_level_rewards", "response_mask", "index", "config"}
#: what verl's config wants besides what a loss reads
_ACTOR = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
#: float64 sums in another order
_NEAR = 1e-9


def advantage_rule(name: str) -> Rule:
    """verl's advantage estimator of that name as a rule of ``rl.advantages``: rewards stand at each completion's last
    token, nothing is discounted, and all else is as verl's own defaults say.

    Raises:
        ConfigError: verl has none of that name, or it needs more than completions' rewards. The rule itself raises it
            where the estimator does not take the batch, or gives a completion's tokens different advantages.
    """
    where = f"grpo.advantage: verl:{name}"
    if name not in ADV_ESTIMATOR_REGISTRY:
        raise ConfigError(
            "verl has no such advantage estimator", where=where, expected=", ".join(sorted(ADV_ESTIMATOR_REGISTRY))
        )
    estimator = ADV_ESTIMATOR_REGISTRY[name]
    parameters = inspect.signature(estimator).parameters
    needed = {
        each.name for each in parameters.values() if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    }
    if more := sorted(needed - _OUTCOME):
        raise ConfigError(
            "verl's advantage estimator is not one of outcomes",
            where=where,
            got=f"it needs {', '.join(more)}",
            expected="an estimator of the completions' rewards and groups alone",
        )
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return partial(_advantages, estimator, where, takes_any or "index" in parameters)


def _advantages(
    estimator: Callable[..., tuple[Tensor, Tensor]],
    where: str,
    by_group: bool,
    rewards_B: Floats,
    groups_B: Integers,
    tokens_B: Integers,
) -> Floats:
    lengths_B = torch.from_numpy(np.asarray(tokens_B))
    mask_BR = (torch.arange(int(lengths_B.max())) < lengths_B[:, None]).double()
    rewards_BR = torch.zeros_like(mask_BR)
    rewards_BR[torch.arange(len(lengths_B)), lengths_B - 1] = torch.from_numpy(np.asarray(rewards_B, np.float64))
    groups = {"index": groups_B} if by_group else {}
    try:
        found_BR, _ = estimator(
            token_level_rewards=rewards_BR, response_mask=mask_BR, config=AlgoConfig(gamma=1.0), **groups
        )
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise ConfigError(
            "verl's advantage estimator does not take the batch",
            where=where,
            got=f"{len(rewards_B)} completions of {len(np.unique(groups_B))} prompts",
            fix=f"it raised {type(error).__name__}: {error}",
        ) from error
    first_B = found_BR[:, 0]
    if not torch.allclose(found_BR, first_B[:, None] * mask_BR, rtol=_NEAR, atol=_NEAR):
        raise ConfigError(
            "verl's advantage estimator gives the tokens of a completion different advantages",
            where=where,
            expected="one number a completion",
        )
    return first_B.double().numpy()


class _Watched:
    """A config of verl's that knows which of its fields were read."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name != "__dict__":
            self.__dict__.setdefault("_read", set()).add(name)
        return found

    def forget(self) -> None:
        """Nothing was read so far: making it did so, too."""
        self.__dict__["_read"] = set()

    def unread(self, names: Mapping[str, Any]) -> list[str]:
        """Which of these fields nobody has read."""
        return sorted(names.keys() - self.__dict__["_read"])


class _ActorConfig(_Watched, ActorConfig):
    """What a policy loss is handed."""


class _PolicyLossConfig(_Watched, PolicyLossConfig):
    """Its part ``policy_loss``."""


class VerlPolicyLoss(PolicyLoss):
    """verl's policy loss of that name: ``sum_t w_t * loss_t``, where verl's own value is ``sum_t loss_t / tokens``.

    It is asked for its "token-mean", times the tokens. Each token's part of that is the derivative by the token's place
    in verl's mask, which is exact where the sum is linear in it: where a token's loss depends on no other token. A loss
    of whole sequences, a mean over sequences, or one that picks tokens by how they compare, is refused: here its value
    would depend on how samples fall into micro-batches.

    Figures are as of :class:`losses.policy.PolicyLoss`, without ``policy/clip_share``, which verl does not tell of
    tokens.

    Args:
        name: a key of verl's registry. options: fields of verl's ActorConfig that it reads, as ``clip_ratio_low``, and
            of PolicyLossConfig under ``policy_loss``. temperature: that the samples were drawn at.

    Raises:
        ConfigError: verl has no such loss or option, the loss is not one of tokens, or it does not read an option:
            what verl's actor does besides its loss (``use_kl_loss``, ``loss_agg_mode``, its optimiser) is done by
            nobody here.
    """

    def __init__(
        self, name: str = "vanilla", options: Mapping[str, Any] | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__(temperature=temperature)
        known = ", ".join(sorted(POLICY_LOSS_REGISTRY))
        check_option("name", name, name in POLICY_LOSS_REGISTRY, f"one of {known}")
        given = dict(options or {})
        of_loss = given.pop("policy_loss", {})
        policy_loss = _PolicyLossConfig(loss_mode=name, **of_loss)
        self._config = _ActorConfig(**_ACTOR, policy_loss=policy_loss, **given)
        for each in (policy_loss, self._config):
            each.forget()
        self._verl = POLICY_LOSS_REGISTRY[name]
        self.figures = tuple(each for each in self.figures if each != "policy/clip_share")
        check_option(
            "name", name, self._is_of_tokens(), "a loss that is the mean over tokens, none of which depends on others"
        )
        unread = [*self._config.unread(given), *(f"policy_loss.{each}" for each in policy_loss.unread(of_loss))]
        check_option("options", ", ".join(unread), not unread, f"fields that verl's {name} reads")

    def of_tokens(
        self, logprobs_N: Tensor, old_N: Tensor, signals: dict[str, Tensor], segments_N: Tensor, segments: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, figures) of each token, [N]."""
        values_N = self._values(logprobs_N, old_N, signals[ADVANTAGES].to(logprobs_N))
        figures = {"policy/ratio": token_log_ratio(logprobs_N, old_N).exp(), "policy/kl": kl_k3(old_N, logprobs_N)}
        if ROLLOUT in signals:
            figures |= mismatch_figures(old_N, signals[ROLLOUT])
        return values_N, figures

    def _is_first(self, batch: Any, head: Any) -> bool:
        return False  # only verl knows what its loss's gradient is then

    def _values(self, logprobs_N: Tensor, old_N: Tensor, advantages_N: Tensor) -> Tensor:
        if not len(logprobs_N):
            return logprobs_N
        with torch.enable_grad():
            # One row: a token that depends on no other needs no sequence of its own, and no padding.
            mask_1N = torch.ones_like(logprobs_N)[None].requires_grad_()
            mean = self._mean(logprobs_N[None], old_N[None], advantages_N[None], mask_1N)
            (values_1N,) = torch.autograd.grad(mean * mask_1N.sum(), mask_1N, create_graph=True)
        return values_1N[0]

    def _mean(self, logprobs_BR: Tensor, old_BR: Tensor, advantages_BR: Tensor, mask_BR: Tensor) -> Tensor:
        """verl's own value."""
        value, _ = self._verl(
            old_log_prob=old_BR,
            log_prob=logprobs_BR,
            advantages=advantages_BR,
            response_mask=mask_BR,
            loss_agg_mode="token-mean",
            config=self._config,
        )
        return value

    def _is_of_tokens(self) -> bool:
        """Whether tokens, near and far from what they were, good and bad, have alone the losses that they have among
        others, and verl's own value of two completions, of 12 and 4 of them, is the mean of all."""
        moved_N = torch.tensor([-1.5, -0.3, -0.05, 0.0, 0.02, 0.25, 0.4, 2.0], dtype=torch.float64).repeat(2)
        old_N = -torch.linspace(0.1, 4.0, len(moved_N), dtype=torch.float64)
        advantages_N = torch.linspace(-1.7, 1.3, len(moved_N), dtype=torch.float64)[torch.arange(len(moved_N)) * 7 % 16]
        given = (old_N + moved_N, old_N, advantages_N)
        try:
            together_N = self._values(*given)
        except RuntimeError:  # the mask has no part in the value
            return False
        alone_N = torch.cat([self._values(*each) for each in zip(*(one.split(1) for one in given), strict=True)])
        padded = [pad_sequence(one.split([12, 4]), batch_first=True) for one in (*given, torch.ones_like(old_N))]
        mean = self._mean(*padded)
        return torch.allclose(together_N, alone_N, rtol=_NEAR, atol=_NEAR) and torch.allclose(
            together_N.mean(), mean, rtol=_NEAR, atol=_NEAR
        )
