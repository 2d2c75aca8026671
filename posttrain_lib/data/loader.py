"""From a token store to training steps.

    store --epoch_permutation--> examples --StreamingPacker--> rows --rows_per_step--> steps --row r: rank r % world-->

Everything up to the steps works on lengths alone and is the same on every rank, so no rank talks to another: the
stream of rows is a pure function of (store, seed, row_tokens, packing_buffer, position) and knows no world size. A
rank then builds only its own rows. Epochs follow one another without a seam: packing continues across the boundary.

The position that a checkpoint keeps is the *consumed* one. The thread that works ahead attaches to each step the
position behind it, and handing a step out is what moves the loader's state.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from posttrain_lib.data.order import epoch_permutation
from posttrain_lib.data.packing import Row, StreamingPacker
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import CheckpointError, DataError
from posttrain_lib.schema.batches import PackedBatch

STATE_VERSION = 1
PREFETCHED_STEPS = 2


@dataclass(frozen=True)
class LoadedStep:
    """One optimiser step's data, as one rank sees it.

    ``micro_batches`` are this rank's; every rank has the same number of the same sizes. All the rest is global, over
    the rows of all ranks: ``global_weight`` is the sum of the loss weights in float64, the divisor of the step's loss;
    ``real_tokens`` counts tokens that are no padding, ``slot_tokens`` counts both. ``step`` counts from 1.
    ``data_wait_seconds`` is how long :meth:`PackedLoader.next_step` blocked.
    """

    step: int
    micro_batches: list[PackedBatch]
    global_weight: float
    real_tokens: int
    slot_tokens: int
    data_wait_seconds: float


class RowStream:
    """The global stream of rows: lengths only, the same on every rank, resumable from a small state.

    Args:
        lengths: int32 [N], tokens of each example.
        examples: stop after this many examples (a last epoch may be cut short); None = never.
    """

    def __init__(
        self, lengths: np.ndarray, *, row_tokens: int, packing_buffer: int, seed: int, examples: int | None = None
    ) -> None:
        self._lengths = lengths
        self._seed = seed
        self._examples = examples
        self._packer = StreamingPacker(row_tokens, packing_buffer)
        self._epoch = 0
        self._cursor = 0
        self._order = epoch_permutation(len(lengths), seed, 0)

    def next_row(self) -> Row:
        """Ids of the examples of the next row; an empty row when the stream has ended."""
        total = len(self._lengths)
        while self._examples is None or self._epoch * total + self._cursor < self._examples:
            if self._cursor == total:
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = epoch_permutation(total, self._seed, self._epoch)
                continue
            example = int(self._order[self._cursor])
            self._cursor += 1
            rows = self._packer.push(example, int(self._lengths[example]))
            if rows:
                return rows[0]
        return self._packer.pop_row()

    def state(self) -> dict[str, Any]:
        """The position: how far the order is read and what waits in the packer."""
        return {"epoch": self._epoch, "cursor": self._cursor, "packer": self._packer.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position given by :meth:`state`."""
        self._epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        self._order = epoch_permutation(len(self._lengths), self._seed, self._epoch)
        waiting = [int(example) for example in state["packer"]]
        self._packer.load_state(waiting, [int(self._lengths[example]) for example in waiting])


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

    ``epochs=None`` makes an endless stream; else the stream ends after that many passes, and the last step may have
    rows that hold nothing but padding. Iterate, or call :meth:`next_step`; close it, or use it as a context manager.

    Args:
        store: the training examples.
        row_tokens: length of a packed row.
        rows_per_step: rows of one optimiser step over all ranks.
        micro_batch_rows: rows of one forward of one rank, laid end to end on T.
        packing_buffer: examples that the packer may choose from.
        seed: decides the order.
        rank, world: row r of a step belongs to rank ``r % world``.
        epochs: passes over the examples, may be a fraction.

    Raises:
        DataError: the store is empty, has nothing to train on, or an example is longer than a row.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        row_tokens: int,
        rows_per_step: int,
        micro_batch_rows: int = 1,
        packing_buffer: int = 256,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        epochs: float | None = None,
    ) -> None:
        _check_trainable(store, row_tokens)
        if min(rows_per_step, micro_batch_rows) < 1 or not 0 <= rank < world:
            raise ValueError(f"rows_per_step={rows_per_step} micro_batch_rows={micro_batch_rows} rank={rank}/{world}")
        self._store = store
        self._row_tokens = row_tokens
        self._rows_per_step = rows_per_step
        self._micro_batch_rows = micro_batch_rows
        self._packing_buffer = packing_buffer
        self._seed = seed
        self._rank, self._world = rank, world
        self._examples = _example_count(len(store), epochs)
        self._state = self._snapshot(0, self._new_stream())
        self._queue: queue.Queue[_Prepared | _Ended] = queue.Queue(maxsize=PREFETCHED_STEPS)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended: _Ended | None = None

    def next_step(self) -> LoadedStep | None:
        """The next step; None when the epochs are through.

        Raises:
            Whatever went wrong in the background, as it was raised there; again at every further call.
        """
        if self._ended is None and self._thread is None:
            self._start()
        begun = time.perf_counter()
        item = self._ended or self._queue.get()
        waited = time.perf_counter() - begun
        if isinstance(item, _Ended):
            self._ended = item
            if item.error is not None:
                raise item.error
            return None
        self._state = item.state_after
        return LoadedStep(**{**vars(item.step), "data_wait_seconds": waited})

    def __iter__(self) -> Iterator[LoadedStep]:
        while (step := self.next_step()) is not None:
            yield step

    def state(self) -> dict[str, Any]:
        """The position behind the last step handed out, JSON-ready; steps made ahead do not show in it."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a position given by :meth:`state`, on this or any other number of ranks.

        Raises:
            CheckpointError: the position is of another store, seed or packing; it says which.
        """
        own = self._identity()
        for name, value in own.items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the data position is of another run: {name} differs",
                    where=f"data position, {name}",
                    got=state.get(name),
                    expected=value,
                    fix="resume with the data and the train section that the checkpoint was made with, or start anew",
                )
        self.close()
        self._state = state
        self._ended = None

    def close(self) -> None:
        """Stop the background thread and drop what it made ahead; the position stays."""
        self._stop.set()
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
            "store": self._store.digest,
            "seed": self._seed,
            "row_tokens": self._row_tokens,
            "rows_per_step": self._rows_per_step,
            "packing_buffer": self._packing_buffer,
        }

    def _snapshot(self, step: int, stream: RowStream) -> dict[str, Any]:
        return {**self._identity(), "step": step, **stream.state()}

    def _new_stream(self) -> RowStream:
        return RowStream(
            self._store.lengths,
            row_tokens=self._row_tokens,
            packing_buffer=self._packing_buffer,
            seed=self._seed,
            examples=self._examples,
        )

    def _start(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work_ahead, args=(self._stop, self._queue), daemon=True)
        self._thread.start()

    def _work_ahead(self, stop: threading.Event, into: queue.Queue[_Prepared | _Ended]) -> None:
        """Consumes: the row stream. Produces: prepared steps. Waits for: room in the queue. Ends with: an _Ended."""
        try:
            stream = self._new_stream()
            stream.load_state(self._state)
            step = self._state["step"]
            while not stop.is_set():
                rows = [stream.next_row() for _ in range(self._rows_per_step)]
                if not rows[0]:
                    _put(into, _Ended(None), stop)
                    return
                step += 1
                _put(into, _Prepared(self._build(step, rows), self._snapshot(step, stream)), stop)
        except BaseException as error:  # handed to next_step, which raises it in the caller's thread
            _put(into, _Ended(error), stop)

    def _build(self, step: int, rows: list[Row]) -> LoadedStep:
        examples = [example for row in rows for example in row]
        own = rows[self._rank :: self._world]
        own.extend([()] * (-(-self._rows_per_step // self._world) - len(own)))
        return LoadedStep(
            step=step,
            micro_batches=[
                pack_rows(self._store, own[first : first + self._micro_batch_rows], self._row_tokens)
                for first in range(0, len(own), self._micro_batch_rows)
            ],
            global_weight=float(self._store.weight_sums[examples].sum()),
            real_tokens=int(self._store.lengths[examples].sum(dtype=np.int64)),
            slot_tokens=self._rows_per_step * self._row_tokens,
            data_wait_seconds=0.0,
        )


def pack_rows(store: TokenStore, rows: Sequence[Row], row_tokens: int) -> PackedBatch:
    """Lay ``rows`` end to end: T = ``len(rows) * row_tokens``.

    What a row leaves free becomes a last document of the row, with positions from 0, weight 0 and source -1, so that
    it sees no real token and none sees it. Weights move from the predicted token to the position that predicts it;
    that of a document's first token, which nothing predicts, falls away.
    """
    total = len(rows) * row_tokens
    token_ids, target_ids, positions = (np.zeros(total, np.int64) for _ in range(3))
    loss_weights = np.zeros(total, np.float32)
    boundaries, sources, ids = [0], [], []
    count = np.arange(row_tokens, dtype=np.int64)
    real_tokens = 0
    for number, row in enumerate(rows):
        begin = number * row_tokens
        for example in row:
            tokens, weights = store.get(example)
            end = begin + len(tokens)
            token_ids[begin:end] = tokens
            target_ids[begin : end - 1] = tokens[1:]
            loss_weights[begin : end - 1] = weights[1:]
            positions[begin:end] = count[: len(tokens)]
            boundaries.append(end)
            sources.append(int(store.source_index[example]))
            ids.append(example)
            real_tokens += len(tokens)
            begin = end
        end = (number + 1) * row_tokens
        if begin < end:
            positions[begin:end] = count[: end - begin]
            boundaries.append(end)
            sources.append(-1)
            ids.append(-1)
    cu_seqlens = np.asarray(boundaries, dtype=np.int32)
    return PackedBatch(
        token_ids=token_ids,
        target_ids=target_ids,
        loss_weights=loss_weights,
        positions=positions,
        cu_seqlens=cu_seqlens,
        supervised_index=np.flatnonzero(loss_weights).astype(np.int64, copy=False),
        document_sources=np.asarray(sources, dtype=np.int32),
        document_ids=np.asarray(ids, dtype=np.int64),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        real_tokens=real_tokens,
    )


def count_steps(
    lengths: np.ndarray, *, row_tokens: int, rows_per_step: int, packing_buffer: int, seed: int, epochs: float
) -> int:
    """Optimiser steps in ``epochs`` passes, exact: the packer runs over the lengths (about a million examples/s).

    Raises:
        DataError: an example is longer than a row.
    """
    stream = RowStream(
        lengths,
        row_tokens=row_tokens,
        packing_buffer=packing_buffer,
        seed=seed,
        examples=_example_count(len(lengths), epochs),
    )
    rows = sum(1 for _ in iter(stream.next_row, ()))
    return -(-rows // rows_per_step)


def held_out_batches(
    store: TokenStore, *, row_tokens: int, rank: int = 0, world: int = 1, batch_rows: int = 1, packing_buffer: int = 256
) -> Iterator[PackedBatch]:
    """Every example once, in the store's order, packed; rows are dealt out over the ranks.

    Every rank yields the same number of batches of the same size, so that collective calls meet: rows that are
    missing at the end hold nothing but padding, of weight 0. The batches depend on no seed.

    Raises:
        DataError: the store has nothing to evaluate on, or an example is longer than a row.
    """
    _check_trainable(store, row_tokens)
    packer = StreamingPacker(row_tokens, packing_buffer)
    rows: list[Row] = []
    for example, length in enumerate(store.lengths.tolist()):
        rows.extend(packer.push(example, length))
    rows.extend(packer.flush())
    per_rank = -(-len(rows) // world)
    own = rows[rank::world]
    own.extend([()] * (per_rank - len(own)))
    for first in range(0, per_rank, batch_rows):
        yield pack_rows(store, own[first : first + batch_rows], row_tokens)


def _check_trainable(store: TokenStore, row_tokens: int) -> None:
    if store.trained_tokens == 0:
        raise DataError(
            "the token store has nothing to train on",
            where=store.folder,
            got=f"{len(store)} examples, none with a weight above 0",
            fix="look at the receipt and the quarantine of the prepared data",
        )
    if store.longest > row_tokens:
        example = int(np.argmax(store.lengths))
        raise DataError(
            "an example is longer than a packed row",
            where=f"{store.folder}, row {store.row_id(example)}",
            got=f"{store.longest} tokens",
            expected=f"at most {row_tokens} tokens (train.row_tokens)",
            fix="raise train.row_tokens, or lower data.max_example_tokens and prepare the data again",
        )


def _example_count(total: int, epochs: float | None) -> int | None:
    return None if epochs is None else max(1, round(total * epochs))


def _put(into: queue.Queue[_Prepared | _Ended], item: _Prepared | _Ended, stop: threading.Event) -> None:
    """Put unless the loader is being closed; a plain put could wait for ever on a queue that nobody reads."""
    while not stop.is_set():
        try:
            into.put(item, timeout=0.05)
            return
        except queue.Full:
            continue
