"""Work spread over processes, results in order, and none lost when a process dies.

Processes are spawned, not forked: the parent may hold threads (of a tokenizer, of Ray) whose locks a fork would copy
in whatever state they are.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from posttrain_lib.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

#: how often the same piece of work may lose its process before it is given up
MOST_DEATHS = 3
_ORPHAN_SECONDS = 1.0
_WARM_SECONDS = 0.01

_state: Any = None
_broken: Exception | None = None


class _Handed(NamedTuple):
    """An item's future, and which of the pool's successive executors it was handed to."""

    future: Future[Any]
    executor: ProcessPoolExecutor


@dataclass
class _Line:
    """Items under way, each with its future unless it was not handed to the pool yet, and how many of the first of
    them were under way when a process died."""

    waiting: deque[tuple[Any, _Handed | None]]
    suspects: int


class OrderedPool(Generic[Item, Result]):
    """``map`` over worker processes: results come in the order of the items, whatever finishes first.

    A process that dies (killed for memory, say) takes the pool with it; a new one is started and what had no result
    yet is done again, so every item has exactly one result. Several calls of ``map`` may share the processes.
    With 0 workers all is done in the caller.

    Args:
        make_state: makes, once in each process, what ``work`` gets as its first argument; both importable by name.
        work: (state, item) -> result.
        name_item: how to name an item in an error.
    """

    def __init__(
        self,
        workers: int,
        make_state: Callable[..., Any],
        arguments: tuple[Any, ...],
        work: Callable[[Any, Item], Result],
        name_item: Callable[[Item], str],
    ) -> None:
        self.workers = workers
        self.deaths = 0
        self._make_state, self._arguments, self._work, self._name_item = make_state, arguments, work, name_item
        self._executor: ProcessPoolExecutor | None = None
        self._own_state: Any = None

    def map(self, items: Iterable[Item], *, ahead: int | None = None) -> Iterator[Result]:
        """Results of ``items`` in order; at most ``ahead`` items (default: three a worker) are under way.

        Raises:
            DataError: an item's process died several times; the item is named.
            Whatever ``work`` raises.
        """
        if self.workers == 0:
            for item in items:
                yield self._work(self._state(), item)
            return
        line = _Line(deque(), 0)
        most = ahead or 3 * self.workers
        for item in items:
            if len(line.waiting) >= most:
                yield self._result(line)
            line.waiting.append((item, None))
            self._submit(line)
        while line.waiting:
            yield self._result(line)

    def warm(self, *, wait: bool = False) -> None:
        """Start the processes, or make the caller's own state, before there is work; ``wait`` until all are ready."""
        if self.workers == 0:
            self._state()
            return
        # As many as there are processes, each long enough to keep one busy while the others start.
        started = [self._pool().submit(_nothing, _WARM_SECONDS) for _ in range(self.workers)]
        for each in started if wait else ():
            each.result()

    def close(self) -> None:
        """Stop the processes; what is under way is dropped."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _state(self) -> Any:
        if self._own_state is None:
            self._own_state = self._make_state(*self._arguments)
        return self._own_state

    def _submit(self, line: _Line) -> None:
        """Hand to the pool what waits for it; while a death is being looked into, nothing."""
        if line.suspects:
            return
        for place, (item, handed) in enumerate(line.waiting):
            if handed is None:
                try:
                    line.waiting[place] = (item, self._hand(item))
                except BrokenProcessPool:  # what was handed in before it will say so
                    return

    def _result(self, line: _Line) -> Any:
        """The result of the first in line. After a death, those in line go one by one: so the one to blame is known."""
        item, handed = line.waiting.popleft()
        for death in range(MOST_DEATHS + 1):
            executor = self._executor if handed is None else handed.executor
            try:
                handed = handed or self._hand(item)
                executor = handed.executor
                result = handed.future.result()
                line.suspects = max(0, line.suspects - 1)
                self._submit(line)
                return result
            except (BrokenProcessPool, CancelledError):
                handed = None
                self._replace(executor)
                if line.suspects == 0:
                    line.suspects = len(line.waiting) + 1
                    line.waiting = deque((each, None) for each, _ in line.waiting)
                elif death >= MOST_DEATHS - 1:
                    break
        raise DataError(
            f"a worker process died {MOST_DEATHS} times over the same rows",
            where=self._name_item(item),
            got="killed, out of memory, or crashed in native code",
            fix="look at these rows; use fewer workers (data.workers, compute.loader_workers) if memory is short",
        )

    def _pool(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(os.getpid(), self._make_state, self._arguments),
            )
        return self._executor

    def _hand(self, item: Item) -> _Handed:
        executor = self._pool()
        return _Handed(executor.submit(_do, self._work, item), executor)

    def _replace(self, broken: ProcessPoolExecutor | None) -> None:
        """Drop a broken executor, unless another call of ``map`` has done so."""
        if broken is not None and broken is self._executor:
            self.deaths += 1
            broken.shutdown(wait=False, cancel_futures=True)
            self._executor = None


def _begin(parent: int, make_state: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _state, _broken
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    try:
        _state = make_state(*arguments)
    except Exception as error:  # an initialiser's error would only say that the pool is broken
        _broken = error


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone: a killed parent tells nobody."""
    while os.getppid() == parent:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(1)


def _nothing(seconds: float) -> None:
    time.sleep(seconds)


def _do(work: Callable[[Any, Any], Any], item: Any) -> Any:
    if _broken is not None:
        raise _broken
    return work(_state, item)
