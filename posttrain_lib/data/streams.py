"""Streams of units: what a source gives, one unit after another, over and over; and the interface that mixing needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

#: units looked at in one go
_AHEAD = 4096


class Stream(Protocol):
    """Units in a fixed order. Its state is small and JSON-ready."""

    def peek(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [n], packed lengths int32 [n]) of units that come next, at least one; none when exhausted."""

    def advance(self, count: int) -> None:
        """Move past ``count`` of the units that :meth:`peek` gave."""

    def state(self) -> dict[str, Any]:
        """The position behind the last unit moved past."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position given by :meth:`state`."""


class StoreStream:
    """Units of a token store.

    Args:
        order: epoch -> int64 [n], the units in that epoch's order.
        lengths: int32 [U], packed tokens of every unit of the store.
        limit: units to give before it is exhausted (a last pass may be cut short); None = without end.
    """

    def __init__(self, order: Callable[[int], np.ndarray], lengths: np.ndarray, *, limit: int | None) -> None:
        self._order_of, self._lengths, self._limit = order, lengths, limit
        self._epoch, self._cursor = 0, 0
        self._order = order(0)

    def peek(self) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Stream`."""
        total = len(self._order)
        through = self._limit is not None and self._epoch * total + self._cursor >= self._limit
        if self._cursor == total and total > 0 and not through:
            self._go_to(self._epoch + 1, 0)
        end = self._cursor + _AHEAD
        if self._limit is not None:
            end = min(end, self._limit - self._epoch * total)
        ids = self._order[self._cursor : max(self._cursor, end)]
        return ids, self._lengths[ids]

    def advance(self, count: int) -> None:
        """See :class:`Stream`."""
        self._cursor += count

    def state(self) -> dict[str, Any]:
        """See :class:`Stream`."""
        return {"epoch": self._epoch, "cursor": self._cursor}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`Stream`."""
        self._go_to(int(state["epoch"]), int(state["cursor"]))

    def _go_to(self, epoch: int, cursor: int) -> None:
        if epoch != self._epoch:  # ordering a large store takes seconds
            self._order = self._order_of(epoch)
        self._epoch, self._cursor = epoch, cursor
