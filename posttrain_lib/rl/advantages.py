"""Advantages by name: what each completion of a batch is worth, from its reward and those beside it.

A rule takes three arrays of one entry a completion and gives one of the same length. An advantage holds for every token
of its completion: rewards are of whole completions, and nothing is discounted.

    rewards_B      float [B]
    groups_B       int [B], equal for the completions of one prompt
    tokens_B       int [B], trained tokens of each
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from posttrain_lib.errors import ConfigError
from posttrain_lib.registry import check_options, resolve
from posttrain_lib.rl.rewards.shaping import finite

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Rule = Callable[[Floats, Integers, Integers], Floats]

#: added to a standard deviation, as verl and the paper's own code do
_NEAR_ZERO = 1e-6
#: added to a variance, as verl does where it whitens a batch
_NEAR_ZERO_VARIANCE = 1e-8

RULES: dict[str, str] = {
    "grpo": "posttrain_lib.rl.advantages:grpo",
    "dr_grpo": "posttrain_lib.rl.advantages:dr_grpo",
    "rloo": "posttrain_lib.rl.advantages:rloo",
    "reinforce_plus_plus": "posttrain_lib.rl.advantages:reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "posttrain_lib.rl.advantages:reinforce_plus_plus_baseline",
}


#: beginning of a name -> what makes the rule of what follows on it
FAMILIES: dict[str, str] = {"verl": "posttrain_lib.adapters.verl_algorithms:advantage_rule"}


def rule_of(name: str) -> Rule:
    """The rule called ``name``; one of another library's by ``library:name``, or a user's own by ``module:attribute``.

    Raises:
        ConfigError: no such rule, or one that needs more or takes less than there is.
    """
    family, _, rest = name.partition(":")
    if family in FAMILIES and rest:
        make = resolve(family, FAMILIES, what="advantage rules", where="grpo.advantage")
        made: Rule = make(rest)
        return made
    found: Rule = resolve(name, RULES, what="advantage rule", where="grpo.advantage")
    check_options(found, {}, what="advantage rule", where="grpo.advantage", leading=3)
    return found


def advantages_of(name: str, rewards: Floats, groups: Integers, tokens: Integers) -> Floats:
    """Float64 [B] by the rule called ``name`` (:func:`rule_of`).

    Raises:
        ConfigError: no such rule, or what it gave is not one finite number a completion.
        DataError: a reward is not finite; graders' failures are to be sorted out before.
    """
    rule = rule_of(name)
    rewards = finite(rewards)
    found = np.asarray(rule(rewards, np.asarray(groups), np.asarray(tokens)), dtype=np.float64)
    if found.shape != rewards.shape or not np.isfinite(found).all():
        raise ConfigError(
            "the advantage rule gave something else than one finite number a completion",
            where="grpo.advantage",
            got=f"{name}: shape {found.shape}, {int((~np.isfinite(found)).sum())} not finite",
            expected=f"shape {rewards.shape}",
        )
    return found


def grpo(rewards_B: Floats, groups_B: Integers, tokens_B: Integers) -> Floats:
    """Reward less the group's mean, over the group's standard deviation (Shao et al. 2024, equation 3).

    The deviation is the unbiased one, as in verl and TRL. A group of one, or of equal rewards, has advantages of 0.
    """
    centred, spread = _centred(rewards_B, groups_B), _group_spread(rewards_B, groups_B)
    return centred / (spread + _NEAR_ZERO)


def dr_grpo(rewards_B: Floats, groups_B: Integers, tokens_B: Integers) -> Floats:
    """Reward less the group's mean, not divided: easy and hard prompts keep their weight (Liu et al. 2025)."""
    return _centred(rewards_B, groups_B)


def rloo(rewards_B: Floats, groups_B: Integers, tokens_B: Integers) -> Floats:
    """Reward less the mean of the group's others (Ahmadian et al. 2024). A group of one has an advantage of 0."""
    sizes = _sizes(groups_B)
    return _centred(rewards_B, groups_B) * sizes / np.maximum(sizes - 1, 1)


def reinforce_plus_plus(rewards_B: Floats, groups_B: Integers, tokens_B: Integers) -> Floats:
    """Reward made zero in mean and one in variance over the batch's tokens (Hu et al. 2025); groups count nowhere."""
    return _whitened(rewards_B, tokens_B)


def reinforce_plus_plus_baseline(rewards_B: Floats, groups_B: Integers, tokens_B: Integers) -> Floats:
    """As ``reinforce_plus_plus``, of the rewards less their group's mean. A group of one stands at 0 before."""
    return _whitened(_centred(rewards_B, groups_B), tokens_B)


def _sizes(groups_B: Integers) -> Integers:
    _, inverse, counts = np.unique(groups_B, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse])


def _centred(rewards_B: Floats, groups_B: Integers) -> Floats:
    _, first, inverse, counts = np.unique(groups_B, return_index=True, return_inverse=True, return_counts=True)
    # Of differences from one of them: a mean of equal numbers may be another number, and what divides it is small.
    differences = rewards_B - rewards_B[first][inverse]
    means = np.bincount(inverse, differences, len(counts)) / counts
    return np.asarray(differences - means[inverse])


def _group_spread(rewards_B: Floats, groups_B: Integers) -> Floats:
    _, inverse, counts = np.unique(groups_B, return_inverse=True, return_counts=True)
    squares = np.bincount(inverse, _centred(rewards_B, groups_B) ** 2, len(counts))
    return np.asarray(np.sqrt(squares / np.maximum(counts - 1, 1))[inverse])


def _whitened(values_B: Floats, tokens_B: Integers) -> Floats:
    """Over tokens: a long completion counts as often as it has tokens; the variance is the unbiased one."""
    total = int(tokens_B.sum())
    if total < 2:
        return np.zeros_like(values_B)
    differences = values_B - values_B[0]
    centred = differences - (differences @ tokens_B) / total
    variance = (centred**2 @ tokens_B) / (total - 1)
    return np.asarray(centred / np.sqrt(variance + _NEAR_ZERO_VARIANCE))
