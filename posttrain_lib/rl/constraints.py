"""Which tokens may come next: a trie over a catalogue, and a state machine (``schema.rollouts.AllowedTokens``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from posttrain_lib.errors import ConfigError, RolloutError

Ids = NDArray[np.int64]


class Trie:
    """Completions are entries of a catalogue, each followed by ``end_id``, and nothing else.

    Node n of a level is the n-th distinct beginning of that length, in the order of ids; the children of a node lie
    side by side in the next level. Two arrays a level, however many entries: a step down is a binary search.
    """

    def __init__(self, catalogue: Sequence[Sequence[int]], end_id: int) -> None:
        """Build the levels.

        Args:
            catalogue: token sequences without their end; one that is there twice counts once.

        Raises:
            ConfigError: no entry, an empty one, or one with a negative id or ``end_id`` inside.
        """
        for number, entry in enumerate(catalogue):
            if len(entry) == 0 or min(entry) < 0 or end_id in entry:
                raise ConfigError(
                    "an entry of the catalogue cannot be a completion",
                    where=f"entry {number}",
                    got=list(entry)[:8],
                    expected=f"one or more ids of at least 0, {end_id} (the end) not among them",
                )
        if len(catalogue) == 0:
            raise ConfigError("the catalogue is empty", expected="at least one entry")
        longest = max(map(len, catalogue)) + 1
        # Behind the end stands -1, which is no token and sorts first.
        entries_NL = np.full((len(catalogue), longest), -1, dtype=np.int64)
        for row, entry in zip(entries_NL, catalogue, strict=True):
            row[: len(entry)] = entry
            row[len(entry)] = end_id
        self._levels = _levels(entries_NL[np.lexsort(entries_NL.T[::-1])])

    def after(self, sampled: Sequence[int]) -> Ids:
        """Ids that go on with some entry; empty behind a whole one.

        Raises:
            RolloutError: no entry begins like this.
        """
        node = 0
        for place, token in enumerate(sampled):
            children = self._children(place, node)
            found = int(np.searchsorted(children, token))
            if found == len(children) or children[found] != token:
                raise RolloutError(
                    "no entry of the catalogue begins like this completion",
                    where=f"token {place}",
                    got=list(sampled[: place + 1])[-8:],
                    expected=f"one of {children[:8].tolist()} ({len(children)} ids)",
                )
            node = int(self._levels[place][1][node]) + found
        return self._children(len(sampled), node)

    def _children(self, level: int, node: int) -> Ids:
        if level == len(self._levels):
            return np.empty(0, dtype=np.int64)
        tokens, begins = self._levels[level]
        return tokens[begins[node] : begins[node + 1]]


def _levels(entries_NL: Ids) -> list[tuple[Ids, Ids]]:
    """For each level (tokens of the next level's nodes, where those of each node begin and, last, end)."""
    levels = []
    node = np.zeros(len(entries_NL), dtype=np.int64)  # the node of each entry
    count = 1
    for token in entries_NL.T:
        alive = token >= 0
        token, node, entries = token[alive], node[alive], np.flatnonzero(alive)
        new = np.ones(len(entries), dtype=bool)
        new[1:] = (node[1:] != node[:-1]) | (token[1:] != token[:-1])
        levels.append((token[new], np.searchsorted(node[new], np.arange(count + 1))))
        count = int(new.sum())
        below = np.full(len(alive), -1, dtype=np.int64)
        below[entries] = np.cumsum(new) - 1
        node = below
    return levels


@dataclass(frozen=True)
class State:
    """``tokens``: the state that each leads to. ``otherwise``: where any other token leads; None: no other may come."""

    tokens: Mapping[int, str] = field(default_factory=dict)
    otherwise: str | None = None


class StateMachine:
    """Completions are walks through named states."""

    def __init__(self, states: Mapping[str, State], start: str) -> None:
        """Keep the states.

        Raises:
            ConfigError: a state that leads to one that does not exist, or no such start.
        """
        for name, state in states.items():
            unknown = {*state.tokens.values(), *([] if state.otherwise is None else [state.otherwise])} - set(states)
            if unknown:
                raise ConfigError(
                    "a state leads to one that does not exist", where=f"state {name}", got=sorted(unknown)
                )
        if start not in states:
            raise ConfigError("the first state does not exist", got=start, expected=sorted(states))
        self._states, self._start = dict(states), start
        self._allowed = {
            name: None if state.otherwise is not None else np.array(sorted(state.tokens), dtype=np.int64)
            for name, state in states.items()
        }

    def after(self, sampled: Sequence[int]) -> Ids | None:
        """Ids that lead on; empty where the walk is at its end, None where any does.

        Raises:
            RolloutError: a token that its state does not allow.
        """
        name = self._start
        for place, token in enumerate(sampled):
            state = self._states[name]
            following = state.tokens.get(token, state.otherwise)
            if following is None:
                raise RolloutError(
                    "a token that its state does not allow",
                    where=f"token {place}, state {name}",
                    got=token,
                    expected=f"one of {sorted(state.tokens)[:8]} ({len(state.tokens)} ids)",
                )
            name = following
        return self._allowed[name]
