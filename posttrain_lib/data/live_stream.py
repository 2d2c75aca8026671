"""A stream of units out of rows that are tokenised while training runs, and that resumes exactly."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain_lib.data.encoding import EncodedRow, Example, RawRow
from posttrain_lib.data.live_rows import FIRST_WINDOW_START, At, LiveFile, WindowStart, windows
from posttrain_lib.data.oddities import Oddities
from posttrain_lib.data.units import LEAST_SHARED
from posttrain_lib.data.workers import OrderedPool

#: rows of one work item: few, so that the first step is there soon
_CHUNK_ROWS = 16
_UNITS_AHEAD = 16

Pool = OrderedPool[list[RawRow], tuple[list[EncodedRow], Oddities]]


@dataclass(frozen=True)
class LiveUnit:
    """A unit and where it came from: ``at`` its row, ``part`` its number among the units of that row.

    ``skipped[i]`` tokens of ``examples[i]`` are those of the example before it.
    """

    at: At
    part: int
    source: int
    examples: tuple[Example, ...]
    skipped: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Packed tokens."""
        return sum(len(example.ids) for example in self.examples) - sum(self.skipped)


@dataclass(frozen=True)
class _Visited:
    """A row that was visited: its units, and what is to be counted when the stream moves past it."""

    at: At
    row: EncodedRow
    units: tuple[LiveUnit, ...]


class LiveStream:
    """Units of some files' rows, in windows of ``window`` rows. See :class:`~posttrain_lib.data.streams.Stream`.

    Args:
        files: all files, sources one after the other.
        pool: encodes rows.
        new_ids: registers units, gives their ids.
        moved_past: called with each row, in order, when the stream moves past it.
        row_tokens, share_prefixes: what decides which documents of a row form a unit.
    """

    def __init__(
        self,
        files: Sequence[LiveFile],
        pool: Pool,
        *,
        window: int,
        seed: int,
        epochs: int | None,
        row_tokens: int,
        share_prefixes: bool,
        new_ids: Callable[[Sequence[LiveUnit]], list[int]],
        moved_past: Callable[[At, EncodedRow], None],
    ) -> None:
        self._files, self._pool, self._window, self._seed, self._epochs = files, pool, window, seed, epochs
        self._row_tokens, self._share = row_tokens, share_prefixes
        self._new_ids, self._moved_past = new_ids, moved_past
        self.counts: Counter[str] = Counter()
        self._starts: dict[tuple[int, int], WindowStart] = {}
        self._begin(FIRST_WINDOW_START, At(0, 0, 0), 0, frozenset())

    def _begin(self, start: WindowStart, at: At, part: int, wanted: frozenset[At]) -> None:
        self._at, self._part = at, part
        self._visits = self._visited(start, wanted)
        self._rows: deque[_Visited] = deque()  # looked at, not moved past
        self._ahead: deque[tuple[int, LiveUnit]] = deque()  # units of those rows, with ids
        self._dry = False
        self._fruitless: int | None = None  # the epoch in which rows without a unit began

    def peek(self) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`~posttrain_lib.data.streams.Stream`."""
        while not self._dry and not self._ahead:
            self._look_ahead()
            # Rows without a unit, with none before them that waits: a long stretch of them must not pile up.
            while self._rows and not self._ahead:
                self._pass(self._rows.popleft())
        seen = list(self._ahead)[:_UNITS_AHEAD]
        return np.array([unit for unit, _ in seen], np.int64), np.array([unit.tokens for _, unit in seen], np.int32)

    def advance(self, count: int) -> None:
        """See :class:`~posttrain_lib.data.streams.Stream`."""
        for _ in range(count):
            _, unit = self._ahead.popleft()
            while self._rows[0].at < unit.at:  # rows without a unit
                self._pass(self._rows.popleft())
            self._at, self._part = unit.at, unit.part + 1
            if unit.part + 1 == len(self._rows[0].units):
                self._pass(self._rows.popleft())

    def state(self, oldest: At | None = None) -> dict[str, Any]:
        """The position; ``oldest`` is the row of the oldest unit that still waits somewhere."""
        first = min(self._at[:2], oldest[:2]) if oldest is not None else self._at[:2]
        # No older window will be asked for again: units that wait get younger only.
        self._starts = {key: start for key, start in self._starts.items() if key >= first}
        starts = [start.to_json() for key, start in sorted(self._starts.items()) if key <= self._at[:2]]
        return {"at": list(self._at), "part": self._part, "starts": starts, "counts": dict(self.counts)}

    def load_state(self, state: dict[str, Any], wanted: Sequence[tuple[At, int]] = ()) -> dict[tuple[At, int], int]:
        """Go to a position; returns the ids of the ``wanted`` units (row, part), drawn before it.

        Rows before the position are read again from the window of the oldest wanted one, and only those wanted are
        tokenised.
        """
        self.counts = Counter(state["counts"])
        at = At(*map(int, state["at"]))
        starts = [WindowStart.from_json(raw) for raw in state["starts"]] or [FIRST_WINDOW_START]
        self._starts = {(start.epoch, start.window): start for start in starts}
        rows = frozenset(row for row, _ in wanted)
        self._begin(starts[0], at, int(state["part"]), rows)
        found: dict[tuple[At, int], int] = {}
        self._replay(rows, set(wanted), found)
        return found

    def _replay(self, rows: frozenset[At], wanted: set[tuple[At, int]], found: dict[tuple[At, int], int]) -> None:
        """Visit the rows before the position that are asked for, and the one that it lies in."""
        missing = set(rows)
        while missing and not self._dry:
            visited = self._next_visit()
            if visited is None:
                break
            missing.discard(visited.at)
            named = [unit for unit in visited.units if (visited.at, unit.part) in wanted]
            found.update(zip([(unit.at, unit.part) for unit in named], self._new_ids(named), strict=True))
            if visited.at >= self._at:
                self._take_in(visited)

    def _look_ahead(self) -> None:
        visited = self._next_visit()
        if visited is None:
            return
        self._take_in(visited)
        if self._fruitless is not None and visited.at.epoch > self._fruitless + 1:
            self._dry = True  # a whole pass gave nothing to train on, and so will the next
        if visited.units:
            self._fruitless = None
        elif self._fruitless is None:
            self._fruitless = visited.at.epoch

    def _take_in(self, visited: _Visited) -> None:
        """Line a row up, without the units of it that were drawn before the position."""
        left = visited.units
        if visited.at == self._at:
            left = left[self._part :]
            if not left and visited.units:
                return  # moved past already
        self._rows.append(visited)
        self._ahead.extend(zip(self._new_ids(left), left, strict=True))

    def _next_visit(self) -> _Visited | None:
        visited = next(self._visits, None)
        if visited is None:
            self._dry = True
        return visited

    def _pass(self, visited: _Visited) -> None:
        row = visited.row
        self._at, self._part = At(visited.at.epoch, visited.at.window, visited.at.number + 1), 0
        self.counts["rows"] += 1
        self.counts["refused"] += row.refused is not None and row.refused[0] != "nothing_to_train"
        self.counts["held_out"] += row.held_out
        self.counts["units"] += len(visited.units)
        self._moved_past(visited.at, row)

    def _visited(self, start: WindowStart, wanted: frozenset[At]) -> Iterator[_Visited]:
        """Rows from a window's start on, in order, encoded; those before the position only where they are wanted."""
        position, places = self._at, deque[At]()

        def chunks() -> Iterator[list[RawRow]]:
            chunk: list[RawRow] = []
            for window in windows(self._files, start, window=self._window, seed=self._seed, epochs=self._epochs):
                key = (window.start.epoch, window.start.window)
                self._starts.setdefault(key, window.start)
                for index, row in enumerate(window.rows):
                    at = At(*key, index)
                    if at < position and at not in wanted:
                        continue
                    places.append(at)
                    chunk.append(row)
                    if len(chunk) == _CHUNK_ROWS:
                        yield chunk
                        chunk = []
            if chunk:
                yield chunk

        for rows, _ in self._pool.map(chunks()):
            for row in rows:
                at = places.popleft()
                yield _Visited(at, row, () if row.held_out else self._units(at, row))

    def _units(self, at: At, row: EncodedRow) -> tuple[LiveUnit, ...]:
        """As ``units.units_of`` joins the examples of a store's row."""
        joined: list[tuple[list[Example], list[int]]] = []
        for number, example in enumerate(row.examples):
            shared = example.shared if self._share and example.shared >= LEAST_SHARED else 0
            pair = row.kind == "pair" and number % 2 == 1
            if joined and (shared or pair):
                members, skips = joined[-1]
                used = sum(len(member.ids) for member in members) - sum(skips)
                if pair or used + len(example.ids) - shared <= self._row_tokens:
                    members.append(example)
                    skips.append(shared)
                    continue
            joined.append(([example], [0]))
        return tuple(
            LiveUnit(at, part, row.source, tuple(members), tuple(skips)) for part, (members, skips) in enumerate(joined)
        )
