"""Which source gives the next unit: smooth weighted round robin, so that shares hold in every stretch of the stream.

Every source has a credit. When a unit of size z is drawn (z = 1 by samples, its packed tokens by tokens), each source
that takes part earns its share of z and the drawn one pays z. The next draw goes to the source with the most credit.
So what a source has given differs from its share by a few units at any time, not by the square root of what was drawn
as with random draws; and the whole state is one number a source. The rule is nginx's smooth weighted round robin,
with sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain_lib.data.streams import Stream
from posttrain_lib.errors import ConfigError

_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int32))


@dataclass(frozen=True)
class Part:
    """A stream's part in the mixture.

    ``weight``: [(step, weight), ...] with rising steps, linear in between, constant outside.
    ``exhausted``: ``stop`` ends the mixture when the stream is through, ``drop`` leaves the rest to the others
    (a stream that repeats is never through).
    """

    stream: Stream
    weight: tuple[tuple[int, float], ...]
    exhausted: str

    def weight_at(self, step: int) -> float:
        """The weight at optimiser step ``step``."""
        steps, weights = zip(*self.weight, strict=True)
        return float(np.interp(step, steps, weights))


class Mixer:
    """Draws from several streams in the shares of their weights; of a single one, simply draws.

    Raises:
        ConfigError: all weights are 0 at some step of their schedules.
    """

    def __init__(self, parts: Sequence[Part], *, by: str) -> None:
        self._parts = tuple(parts)
        self._by_tokens = by == "tokens"
        self._credits = [0.0] * len(parts)
        self._shares: list[float] = []
        self._shares_of: tuple[int, tuple[bool, ...]] | None = None
        self._drawn_from = 0
        self._ahead: tuple[np.ndarray, np.ndarray] | None = None
        # What each stream gave to look at, and how much of it is used up: asking for every draw would be slow.
        self._seen: list[tuple[np.ndarray, np.ndarray]] = [_NOTHING] * len(parts)
        self._used = [0] * len(parts)
        for step in sorted({step for part in parts for step, _ in part.weight}):
            if not any(part.weight_at(step) > 0 for part in parts):
                raise ConfigError(
                    "no source has a weight above 0", where="train.mixture.sources", got=f"step {step}: all are 0"
                )

    def peek(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, packed lengths) of what comes next for optimiser step ``step``; none when the mixture has ended."""
        if len(self._parts) == 1:
            return self._parts[0].stream.peek()
        if self._ahead is None:
            self._ahead = self._choose(step)
        return self._ahead

    def advance(self, count: int) -> None:
        """Move past ``count`` of the units that :meth:`peek` gave."""
        if len(self._parts) == 1:
            self._parts[0].stream.advance(count)
            return
        if count == 0:
            return
        assert self._ahead is not None and count == 1
        size = float(self._ahead[1][0]) if self._by_tokens else 1.0
        for number, share in enumerate(self._shares):
            self._credits[number] += share * size
        self._credits[self._drawn_from] -= size
        self._parts[self._drawn_from].stream.advance(1)
        self._used[self._drawn_from] += 1
        self._ahead = None

    def state(self) -> dict[str, Any]:
        """The position; a choice that was looked at and not taken does not show."""
        return {"credits": list(self._credits), "streams": [part.stream.state() for part in self._parts]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position given by :meth:`state`."""
        self._credits = [float(credit) for credit in state["credits"]]
        for part, saved in zip(self._parts, state["streams"], strict=True):
            part.stream.load_state(saved)
        self._ahead, self._shares_of = None, None
        self._seen, self._used = [_NOTHING] * len(self._parts), [0] * len(self._parts)

    def _choose(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        for number, part in enumerate(self._parts):
            if self._used[number] == len(self._seen[number][0]):
                self._seen[number], self._used[number] = part.stream.peek(), 0
        live = tuple(len(ids) > 0 for ids, _ in self._seen)
        if any(not alive and part.exhausted == "stop" for alive, part in zip(live, self._parts, strict=True)):
            return _NOTHING
        if self._shares_of != (step, live):
            weights = [part.weight_at(step) if alive else 0.0 for part, alive in zip(self._parts, live, strict=True)]
            total = sum(weights)
            if total == 0:  # exhausted, or what is left has no weight any more
                return _NOTHING
            self._shares, self._shares_of = [weight / total for weight in weights], (step, live)
        standing = [
            credit + share if share > 0 else -np.inf for credit, share in zip(self._credits, self._shares, strict=True)
        ]
        self._drawn_from = int(np.argmax(standing))
        ids, lengths = self._seen[self._drawn_from]
        at = self._used[self._drawn_from]
        return ids[at : at + 1], lengths[at : at + 1]


def natural_weight(size: int, temperature: float) -> tuple[tuple[int, float], ...]:
    """The weight of a source that states none: size ** (1 / temperature).

    Source: the exponential smoothing of Devlin et al., multilingual BERT, 2018; T > 1 evens the sources out.
    """
    return ((1, float(size) ** (1.0 / temperature)),)
