"""From a feed of units to training steps.

    feed --units--> Planner --rows--> step --deal_out--> each rank's rows --pack--> micro-batches

Planning works on lengths alone and is the same on every rank, so no rank talks to another: the stream of rows is a
pure function of (data version, seed, mixture, row length, packing buffer, position) and knows no world size. Which of
a step's rows a rank computes is decided by their cost; it then builds those alone. Epochs follow one another without
a seam: packing continues across the boundary.

The position that a checkpoint keeps is the *consumed* one. The thread that works ahead attaches to each step the
position behind it, and handing a step out is what moves the loader's state.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np

from posttrain_lib.data.assemble import assemble, segments_of, store_filler
from posttrain_lib.data.balance import deal_out
from posttrain_lib.data.kernels import warm
from posttrain_lib.data.packing import Rows, make_packer
from posttrain_lib.data.planner import Feed, Planner, UnitFacts
from posttrain_lib.data.store_feed import StoreFeed, check_trainable
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.data.units import units_of
from posttrain_lib.errors import CheckpointError
from posttrain_lib.schema.batches import PackedBatch

STATE_VERSION = 2
PREFETCHED_STEPS = 2


@dataclass(frozen=True)
class LoadedStep:
    """One optimiser step's data, as one rank sees it.

    ``micro_batches`` are this rank's; every rank has the same number of the same sizes. All the rest is global, over
    the rows of all ranks: ``global_weight`` is the sum of the loss weights in float64;
    ``real_tokens`` counts tokens that are no padding, ``slot_tokens`` counts both. ``source_tokens`` int64 [sources]
    and ``source_units`` int64 [sources] say what each source gave, ``rows`` what became of the rows so far (a live feed
    counts them). ``step`` counts from 1; ``last``: no data is left behind it.
    ``data_wait_seconds`` is how long :meth:`PackedLoader.next_step` blocked.
    """

    step: int
    micro_batches: list[PackedBatch]
    global_weight: float
    real_tokens: int
    slot_tokens: int
    data_wait_seconds: float
    source_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    source_units: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: dict[str, int] = field(default_factory=dict)
    last: bool = False


@dataclass(frozen=True)
class _Prepared:
    step: LoadedStep
    state_after: dict[str, Any]


@dataclass(frozen=True)
class _Ended:
    """The end of the stream, or what broke it."""

    error: BaseException | None


class PackedLoader:
    """Packed training steps of one rank, made ahead of time by a background thread.

    When the feed ends, the last step may have rows that hold nothing but padding. Iterate, or call :meth:`next_step`;
    close it, or use it as a context manager.

    Args:
        feed: the units, in order; closed with the loader.
        row_tokens: length of a packed row.
        rows_per_step: rows of one optimiser step over all ranks.
        micro_batch_rows: rows of one forward of one rank, laid end to end on T.
        packing_buffer: units that the packer may choose from.
        rank, world: a step's rows are dealt out so that all ranks have equally many and about the same cost.
        pair_cost: cost of a query-key pair of attention in units of a token's other cost; see ``training.flops``.
        background: make steps in a thread, ahead of time; else when they are asked for. Make the loader early: its
            compiled parts are loaded beside what the caller does next.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        row_tokens: int,
        rows_per_step: int,
        micro_batch_rows: int = 1,
        packing_buffer: int = 256,
        rank: int = 0,
        world: int = 1,
        pair_cost: float = 0.0,
        background: bool = True,
    ) -> None:
        if min(rows_per_step, micro_batch_rows) < 1 or not 0 <= rank < world:
            raise ValueError(f"rows_per_step={rows_per_step} micro_batch_rows={micro_batch_rows} rank={rank}/{world}")
        self._feed = feed
        self._row_tokens = row_tokens
        self._rows_per_step = rows_per_step
        self._micro_batch_rows = micro_batch_rows
        self._packing_buffer = packing_buffer
        self._rank, self._world = rank, world
        self._pair_cost = pair_cost
        self._background = background
        self._warming = threading.Thread(target=warm, daemon=True) if background else None
        if self._warming is not None:
            self._warming.start()
        self._planner = Planner(feed, row_tokens=row_tokens, packing_buffer=packing_buffer)
        self._state = self._snapshot(0)
        self._planned_state: dict[str, Any] | None = self._state  # where the planner stands; None: it is ahead
        self._queue: queue.Queue[_Prepared | _Ended] = queue.Queue(maxsize=PREFETCHED_STEPS)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended: _Ended | None = None

    def next_step(self) -> LoadedStep | None:
        """The next step; None when the stream has ended.

        Raises:
            Whatever went wrong in the background, as it was raised there; again at every further call.
        """
        begun = time.perf_counter()
        item = self._ended or self._next_item()
        waited = time.perf_counter() - begun
        if isinstance(item, _Ended):
            self._ended = item
            if item.error is not None:
                raise item.error
            return None
        self._state = item.state_after
        return replace(item.step, data_wait_seconds=waited)

    def _next_item(self) -> _Prepared | _Ended:
        if not self._background:
            return self._prepare(self._state)
        if self._thread is None:
            self._stop = threading.Event()
            arguments = (self._state, self._stop, self._queue)
            self._thread = threading.Thread(target=self._work_ahead, args=arguments, daemon=True)
            self._thread.start()
        return self._queue.get()

    def __iter__(self) -> Iterator[LoadedStep]:
        while (step := self.next_step()) is not None:
            yield step

    def state(self) -> dict[str, Any]:
        """The position behind the last step handed out, JSON-ready; steps made ahead do not show in it."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a position given by :meth:`state`, on this or any other number of ranks.

        Raises:
            CheckpointError: the position is of other data, another seed, mixture or packing; it says which, and of
                data which file.
        """
        _check_identity(self._identity(), state)
        self._stop_thread()
        self._state = state
        self._ended = None

    def close(self) -> None:
        """Stop what works ahead and drop what it made; the position stays."""
        self._stop_thread()
        self._feed.close()

    def _stop_thread(self) -> None:
        self._stop.set()
        if self._warming is not None:
            self._warming.join()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._queue = queue.Queue(maxsize=PREFETCHED_STEPS)

    def __enter__(self) -> PackedLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "row_tokens": self._row_tokens,
            "rows_per_step": self._rows_per_step,
            "packing_buffer": self._packing_buffer,
            **self._feed.identity(),
        }

    def _snapshot(self, step: int) -> dict[str, Any]:
        return {**self._identity(), "step": step, **self._planner.state()}

    def _work_ahead(self, state: dict[str, Any], stop: threading.Event, into: queue.Queue[_Prepared | _Ended]) -> None:
        """Consumes: the feed. Produces: prepared steps. Waits for: room in the queue. Ends with: an _Ended."""
        if self._warming is not None:
            self._warming.join()
        while not stop.is_set():
            item = self._prepare(state)
            _put(into, item, stop)
            if isinstance(item, _Ended):
                return
            state = item.state_after

    def _prepare(self, state: dict[str, Any]) -> _Prepared | _Ended:
        """The step behind ``state``. The planner goes there first unless it stands there already."""
        try:
            if self._planned_state is not state:
                self._planner.load_state(state)
            self._planned_state = None
            step = int(state["step"]) + 1
            rows = self._planner.rows(self._rows_per_step, step)
            if len(rows) == 0:
                return _Ended(None)
            loaded, last = self._build(step, rows), self._planner.is_through(step + 1)
            after = self._snapshot(step)
            prepared = _Prepared(replace(loaded, rows=_row_counts(after), last=last), after)
            self._planned_state = prepared.state_after
            return prepared
        except BaseException as error:  # handed to next_step, which raises it in the caller's thread
            return _Ended(error)

    def _build(self, step: int, rows: Rows) -> LoadedStep:
        units = rows.units
        facts = self._feed.facts(units)
        # Every rank gets equally many rows: what is missing is padding, of weight 0.
        rows = rows.filled_up(-(-self._rows_per_step // self._world) * self._world)
        own = rows if self._world == 1 else rows.take(self._deal(rows, facts))
        micro_batches = self._feed.pack(own, self._row_tokens, self._micro_batch_rows)
        self._feed.release(units)
        sources = len(self._feed.sources)
        return LoadedStep(
            step=step,
            micro_batches=micro_batches,
            global_weight=float(facts.weight.sum()),
            real_tokens=int(facts.tokens.sum()),
            slot_tokens=self._rows_per_step * self._row_tokens,
            data_wait_seconds=0.0,
            source_tokens=np.bincount(facts.source, weights=facts.tokens, minlength=sources).astype(np.int64),
            source_units=np.bincount(facts.source, minlength=sources),
        )

    def _deal(self, rows: Rows, facts: UnitFacts) -> list[int]:
        """The numbers of the rows that this rank computes."""
        row_of = np.repeat(np.arange(len(rows)), rows.counts)
        costs = self._row_tokens + self._pair_cost * np.bincount(row_of, weights=facts.pairs, minlength=len(rows))
        return deal_out(costs, self._world)[self._rank]


def _row_counts(state: dict[str, Any]) -> dict[str, int]:
    """What a live feed's streams counted up to a position; nothing of a store's."""
    total: Counter[str] = Counter()
    for stream in state["mixer"]["streams"]:
        total.update(stream.get("counts", {}))
    return dict(total)


def _check_identity(own: dict[str, Any], state: dict[str, Any]) -> None:
    for name, value in own.items():
        saved = state.get(name)
        if saved == value:
            continue
        where, got, expected = name, saved, value
        if isinstance(value, dict) and isinstance(saved, dict):
            # Files and mixtures: name the entry that differs.
            entry = next(key for key in [*value, *saved] if value.get(key) != saved.get(key))
            where, got, expected = f"{name}, {entry}", saved.get(entry), value.get(entry)
        raise CheckpointError(
            f"the data position is of another run: {where} differs",
            where=f"data position, {where}",
            got=got,
            expected=expected,
            fix="resume with the data and the train section that the checkpoint was made with, or start anew",
        )


def count_steps(
    feed: StoreFeed, *, row_tokens: int, rows_per_step: int, packing_buffer: int, most: int | None = None
) -> int:
    """Optimiser steps until ``feed`` ends, exact: the packer runs over the lengths (millions of units a second).

    The feed is afterwards where it was before. One that may repeat without end needs ``most``, where counting stops.
    """
    position = feed.mixer.state()
    planner = Planner(feed, row_tokens=row_tokens, packing_buffer=packing_buffer)
    steps = 0
    while steps != most and len(planner.rows(rows_per_step, steps + 1)):
        steps += 1
    feed.load(position, ())
    return steps


def held_out_batches(
    store: TokenStore,
    *,
    row_tokens: int,
    rank: int = 0,
    world: int = 1,
    batch_rows: int = 1,
    packing_buffer: int = 256,
    share_prefixes: bool = True,
) -> Iterator[PackedBatch]:
    """Every example once, in the store's order, packed; rows are dealt out over the ranks.

    Every rank yields the same number of batches of the same size, so that collective calls meet: rows that are
    missing at the end hold nothing but padding, of weight 0. The batches depend on no seed.

    Raises:
        DataError: the store has nothing to evaluate on, or an example is longer than a row.
    """
    check_trainable(store)
    units = units_of(store, row_tokens, share_prefixes=share_prefixes)
    packer = make_packer(row_tokens, packing_buffer)
    everything = len(units) + 1
    rows = Rows.joined([packer.feed(np.arange(len(units)), units.lengths, everything)[1], packer.flush(everything)])
    per_rank = -(-len(rows) // world)
    own = rows.filled_up(per_rank * world).take(range(rank, per_rank * world, world))
    for first in range(0, per_rank, batch_rows):
        segments = segments_of(store, units, own.take(range(first, min(first + batch_rows, per_rank))))
        yield from assemble(segments, store_filler(store, segments), row_tokens, batch_rows)


def _put(into: queue.Queue[_Prepared | _Ended], item: _Prepared | _Ended, stop: threading.Event) -> None:
    """Put unless the loader is being closed; a plain put could wait for ever on a queue that nobody reads."""
    while not stop.is_set():
        try:
            into.put(item, timeout=0.05)
            return
        except queue.Full:
            continue
