"""Rewards beside each other: made comparable before advantages are taken, and whether they say anything at all.

rewards_B      float [B], finite
groups_B       int [B], equal for the completions of one prompt
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.registry import resolve

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Normalisation = Callable[[Floats, Integers], Floats]

#: a deviation below this share of the largest reward is rounding
_ROUNDING = 1e-9

NORMALISATIONS: dict[str, str] = {
    "none": "posttrain_lib.rl.rewards.shaping:unchanged",
    "group": "posttrain_lib.rl.rewards.shaping:over_group",
    "batch": "posttrain_lib.rl.rewards.shaping:over_batch",
}


def normalised(name: str, rewards: Floats, groups: Integers, *, clip: float | None = None) -> Floats:
    """Float64 [B] by the normalisation called ``name``, then held within ``clip`` of zero.

    Raises:
        ConfigError: no such normalisation, or a clip not above 0. DataError: a reward is not finite.
    """
    rule: Normalisation = resolve(name, NORMALISATIONS, what="normalisation of rewards", where="rewards.normalise")
    if clip is not None and not clip > 0:
        raise ConfigError("rewards are held within a bound above 0", where="rewards.clip", got=clip)
    rewards = finite(rewards)
    found = rule(rewards, np.asarray(groups))
    return found if clip is None else np.clip(found, -clip, clip)


def unchanged(rewards_B: Floats, groups_B: Integers) -> Floats:
    """The rewards themselves."""
    return rewards_B


def over_group(rewards_B: Floats, groups_B: Integers) -> Floats:
    """Less the group's mean, over its standard deviation (the biased one); 0 in groups of equal rewards."""
    _, inverse = np.unique(groups_B, return_inverse=True)
    found = np.empty_like(rewards_B)
    for group in range(int(inverse.max(initial=-1)) + 1):
        found[inverse == group] = _standard(rewards_B[inverse == group])
    return found


def over_batch(rewards_B: Floats, groups_B: Integers) -> Floats:
    """Less the batch's mean, over its standard deviation (the biased one); 0 where all are equal."""
    return _standard(rewards_B)


def signal(rewards: Floats, groups: Integers) -> dict[int, bool]:
    """group -> whether its rewards differ. Advantages within a group of equal rewards are 0: it teaches nothing.

    Raises:
        DataError: a reward is not finite.
    """
    rewards, groups = finite(rewards), np.asarray(groups)
    parts = {int(group): rewards[groups == group] for group in np.unique(groups)}
    return {group: bool(part.min() < part.max()) for group, part in parts.items()}


def _standard(values: Floats) -> Floats:
    if not len(values):
        return values
    # Of numbers of order 1, so that no square overflows or vanishes.
    scale = np.abs(values).max()
    if scale == 0:
        return np.zeros_like(values)
    centred = values / scale - (values / scale).mean()
    deviation = np.sqrt((centred**2).mean())
    return np.zeros_like(values) if deviation < _ROUNDING else centred / deviation


def finite(rewards: Floats) -> Floats:
    """Float64 [B], themselves.

    Raises:
        DataError: one is no finite number; graders' failures are to be sorted out before.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards).all():
        place = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise DataError(
            "a completion's reward is no number",
            where=f"completion {place} of {len(rewards)}",
            got=float(rewards[place]),
            fix="leave samples out whose grading failed",
        )
    return rewards
