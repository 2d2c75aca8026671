"""Steps out of a stream of units: which units share a row, and which rows a step has. Works on lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from posttrain_lib.data.mixture import Mixer
from posttrain_lib.data.packing import Rows, make_packer
from posttrain_lib.schema.batches import PackedBatch

#: units that the first rows of a run are chosen from; twice as many every few rows, up to the packing buffer: a run
#: that tokenises as it goes need not wait until a large buffer is full
FIRST_LOOK_AHEAD = 64
_ROWS_PER_DOUBLING = 8


@dataclass(frozen=True)
class UnitFacts:
    """What planning needs to know of units: weight float64 [n], packed tokens int64 [n], pairs float64 [n] (see
    :class:`~posttrain_lib.data.units.Units`), source int32 [n]."""

    weight: np.ndarray
    tokens: np.ndarray
    pairs: np.ndarray
    source: np.ndarray


class Feed(Protocol):
    """Where units come from: a token store, or rows that are tokenised as they are read."""

    sources: list[str]
    mixer: Mixer

    def identity(self) -> dict[str, Any]:
        """What the stream is a function of, JSON-ready: data version, seed, mixture."""

    def facts(self, units: np.ndarray) -> UnitFacts:
        """Of units that were drawn and not released."""

    def names(self, units: Sequence[int]) -> list[Any]:
        """JSON-ready names by which :meth:`find` knows the units after a restart."""

    def load(self, mixer: dict[str, Any], names: Sequence[Any]) -> list[int]:
        """Go to a position; returns the named units, which were drawn before it."""

    def pack(self, rows: Rows, row_tokens: int, rows_per_batch: int) -> list[PackedBatch]:
        """The tokens of rows of units, laid end to end, in batches of so many rows."""

    def release(self, units: np.ndarray) -> None:
        """The units were packed, or belong to other ranks: they are not needed any more."""

    def name_example(self, example: int) -> str:
        """'source: row id' of an entry of a batch's ``document_ids``."""

    def close(self) -> None:
        """Stop what works beside."""


class Planner:
    """The global stream of rows: the same on every rank, resumable from a small state."""

    def __init__(self, feed: Feed, *, row_tokens: int, packing_buffer: int) -> None:
        self._feed = feed
        self._packer = make_packer(row_tokens, packing_buffer)
        self._buffer = packing_buffer

    def rows(self, count: int, step: int) -> Rows:
        """The next ``count`` rows, for optimiser step ``step``; fewer when the stream has ended, then none."""
        parts: list[Rows] = []
        made = 0
        while made < count:
            ids, lengths = self._feed.mixer.peek(step)
            if len(ids) == 0:
                parts.append(self._packer.flush(count - made))
                break
            before = (step - 1) * count + made
            look_ahead = FIRST_LOOK_AHEAD << min(before // _ROWS_PER_DOUBLING, 30)
            wanted = count - made
            if look_ahead < self._buffer:
                wanted = min(wanted, _ROWS_PER_DOUBLING - before % _ROWS_PER_DOUBLING)
            taken, rows = self._packer.feed(ids, lengths, wanted, look_ahead)
            self._feed.mixer.advance(taken)
            parts.append(rows)
            made += len(rows)
        return Rows.joined(parts)

    def is_through(self, step: int) -> bool:
        """Whether nothing is left for optimiser step ``step``."""
        return len(self._packer) == 0 and len(self._feed.mixer.peek(step)[0]) == 0

    def state(self) -> dict[str, Any]:
        """How far the order is read and what waits in the packer."""
        return {"mixer": self._feed.mixer.state(), "packer": self._feed.names(self._packer.state())}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position given by :meth:`state`."""
        waiting = self._feed.load(state["mixer"], state["packer"])
        lengths = self._feed.facts(np.asarray(waiting, np.int64)).tokens
        self._packer.load_state(waiting, lengths.tolist())
