"""Which source gives the next unit: smooth weighted round robin, so that shares hold in every stretch of the stream.

Every source has a credit. When a unit of size z is drawn (z = 1 by samples, its packed tokens by tokens), each source
that takes part earns its share of z and the drawn one pays z. The next draw goes to the source with the most credit.
So what a source has given differs from its share by a few units at any time, not by the square root of what was drawn
as with random draws; and the whole state is one number a source. The rule is nginx's smooth weighted round robin,
with sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain_lib.data.streams import Stream
from posttrain_lib.errors import ConfigError

_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int32))
#: draws chosen in one go
_CHOICES = 256


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
        # What each stream gave to look at, and how much of it is used up: asking for every draw would be slow.
        self._seen: list[tuple[np.ndarray, np.ndarray]] = [_NOTHING] * len(parts)
        self._used = [0] * len(parts)
        self._plan = _Plan.nothing()
        for step in sorted({step for part in parts for step, _ in part.weight}):
            if not any(part.weight_at(step) > 0 for part in parts):
                raise ConfigError(
                    "no source has a weight above 0", where="train.mixture.sources", got=f"step {step}: all are 0"
                )

    def ends(self) -> bool:
        """Whether the mixture ends by itself: a source that stops it, or all that give something run dry."""
        last = [part for part in self._parts if part.weight[-1][1] > 0]
        return any(part.exhausted == "stop" for part in last) or all(part.exhausted != "repeat" for part in last)

    def may_end(self) -> bool:
        """Whether it ends by itself at some length of the run: one that stops it and is no longer drawn at last may
        yet be through before."""
        return self.ends() or any(part.exhausted == "stop" for part in self._parts)

    def peek(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, packed lengths) of what comes next for optimiser step ``step``; none when the mixture has ended."""
        if len(self._parts) == 1:
            return self._parts[0].stream.peek()
        if self._plan.step != step or self._plan.at == len(self._plan.ids):
            shares = self._shares(step)
            if shares == self._plan.shares and self._plan.at < len(self._plan.ids):
                self._plan.step = step  # the weights stay as they are
            else:
                self._plan = self._look_ahead(step, shares)
        return self._plan.ids[self._plan.at :], self._plan.lengths[self._plan.at :]

    def advance(self, count: int) -> None:
        """Move past ``count`` of the units that :meth:`peek` gave."""
        if len(self._parts) == 1:
            self._parts[0].stream.advance(count)
            return
        if count == 0:
            return
        plan = self._plan
        drawn = plan.sources[plan.at : plan.at + count]
        plan.at += count
        self._credits = plan.credits[plan.at - 1]
        for number in set(drawn):
            taken = drawn.count(number)
            self._parts[number].stream.advance(taken)
            self._used[number] += taken

    def state(self) -> dict[str, Any]:
        """The position; choices that were looked at and not taken do not show."""
        return {"credits": list(self._credits), "streams": [part.stream.state() for part in self._parts]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position given by :meth:`state`."""
        self._credits = [float(credit) for credit in state["credits"]]
        for part, saved in zip(self._parts, state["streams"], strict=True):
            part.stream.load_state(saved)
        self._seen, self._used = [_NOTHING] * len(self._parts), [0] * len(self._parts)
        self._plan = _Plan.nothing()

    def _shares(self, step: int) -> list[float] | None:
        """Each source's share at a step, 0 for those that are through; None when the mixture has ended."""
        for number, part in enumerate(self._parts):
            if self._used[number] == len(self._seen[number][0]):
                self._seen[number], self._used[number] = part.stream.peek(), 0
        live = [len(ids) > 0 for ids, _ in self._seen]
        if any(not alive and part.exhausted == "stop" for alive, part in zip(live, self._parts, strict=True)):
            return None
        left = [part for part, alive in zip(self._parts, live, strict=True) if alive]
        # Those that a schedule brings in later share what one leaves that is through early: they begin then.
        later = sorted({at for part in left for at, _ in part.weight if at > step})
        for at in (step, *later):
            weights = [part.weight_at(at) if alive else 0.0 for part, alive in zip(self._parts, live, strict=True)]
            if (total := sum(weights)) > 0:
                return [weight / total for weight in weights]
        return None  # exhausted, or what is left has no weight any more

    def _look_ahead(self, step: int, shares: list[float] | None) -> _Plan:
        """The next choices, until one of the sources has given all that it showed."""
        plan = _Plan(step, shares, [], [], *_NOTHING)
        if shares is None:
            return plan
        sources = [number for number, share in enumerate(shares) if share > 0]
        standing, used = self._credits, list(self._used)
        ids: list[int] = []
        lengths: list[int] = []
        while len(ids) < _CHOICES:
            chosen = max(sources, key=lambda number: standing[number] + shares[number])
            at, (seen_ids, seen_lengths) = used[chosen], self._seen[chosen]
            ids.append(seen_ids[at])
            lengths.append(seen_lengths[at])
            used[chosen] = at + 1
            size = float(seen_lengths[at]) if self._by_tokens else 1.0
            standing = [credit + share * size for credit, share in zip(standing, shares, strict=True)]
            standing[chosen] -= size
            plan.sources.append(chosen)
            plan.credits.append(standing)
            if at + 1 == len(seen_ids):  # whether there is more decides the shares of what follows
                break
        plan.ids, plan.lengths = np.array(ids, np.int64), np.array(lengths, np.int32)
        return plan


@dataclass
class _Plan:
    """Choices for a step and its shares: which source, which unit, and the credits behind each. Those before ``at`` are
    taken."""

    step: int
    shares: list[float] | None
    sources: list[int]
    credits: list[list[float]]
    ids: np.ndarray
    lengths: np.ndarray
    at: int = 0

    @classmethod
    def nothing(cls) -> _Plan:
        """Of no step."""
        return cls(-1, None, [], [], *_NOTHING)


def natural_weight(size: int, temperature: float) -> tuple[tuple[int, float], ...]:
    """The weight of a source that states none: size ** (1 / temperature).

    Source: the exponential smoothing of Devlin et al., multilingual BERT, 2018; T > 1 evens the sources out.
    """
    # Relative to a source of a million: a small temperature must not overflow.
    return ((1, math.exp(math.log(max(size, 1) / 1e6) / temperature)),)
