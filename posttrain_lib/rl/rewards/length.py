"""Rewards ``overlong`` and ``length``: tokens cost something."""

from __future__ import annotations

from posttrain_lib.errors import ConfigError
from posttrain_lib.rl.rewards.base import Cheap
from posttrain_lib.schema.rollouts import Answer


class Overlong(Cheap):
    """Soft punishment of overlong completions (DAPO, Yu et al. 2025, equation 13): 0 up to ``max_tokens - cache``
    tokens, from there linearly down to -1 at ``max_tokens``, and -1 beyond.

    Args:
        max_tokens: where the punishment is whole.
        cache: tokens over which it grows.

    Raises:
        ConfigError: not 0 < cache <= max_tokens.
    """

    def __init__(self, max_tokens: int, cache: int) -> None:
        if not 0 < cache <= max_tokens:
            raise ConfigError(
                "the punishment grows within the length",
                where="rewards: cache",
                got=cache,
                expected=f"1 to {max_tokens}",
            )
        self._max, self._cache = max_tokens, cache

    def __call__(self, answer: Answer) -> float:
        """From -1 to 0, by the completion's tokens."""
        over = answer.tokens - (self._max - self._cache)
        return -min(max(over, 0) / self._cache, 1.0)


class Length(Cheap):
    """A price of every token behind the first ``free`` ones: a value of 0 or less, times the reward's weight.

    Args:
        per_token: what one costs, above 0.
        free: tokens that cost nothing.

    Raises:
        ConfigError: a price not above 0, or free tokens below 0.
    """

    def __init__(self, per_token: float, free: int = 0) -> None:
        if not per_token > 0 or free < 0:
            raise ConfigError(
                "tokens cost something, and some may be free",
                where="rewards: length",
                got=f"per_token {per_token}, free {free}",
                expected="per_token above 0, free 0 or more",
            )
        self._per_token, self._free = per_token, free

    def __call__(self, answer: Answer) -> float:
        """0 or less, by the completion's tokens."""
        return -self._per_token * max(answer.tokens - self._free, 0)
