"""The rollout engine as something to be awaited: many ask, one thread works it.

    asking: a request --> waiting --submit--> engine.step, step, ... --> the request's future
    exclusive(work)   --> between two rounds of steps, alone with the engine

Consumes: requests. Produces: completions. Waits for: requests. Unblocked by: whoever asks within
:meth:`EnginePump.asking`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

from posttrain_lib.errors import RolloutError
from posttrain_lib.rl.figures import Busy
from posttrain_lib.training import pulse

if TYPE_CHECKING:
    from posttrain_lib.rl.roles import RolloutRole
    from posttrain_lib.rl.trajectories import Complete
    from posttrain_lib.schema.rollouts import Completion, Request

T = TypeVar("T")

#: how long the engine works before others get a word in: new requests, new weights, a stop
_ROUND_SECONDS = 0.05


class EnginePump:
    """Drives an engine for whoever awaits completions. Use it in one event loop.

    Those who ask are known by :meth:`asking`. What is asked for goes in at once, or ``in_waves``: only when everybody
    who is not through has asked, in the order in which they began. What the engine computes side by side, and so the
    bits that it computes, then depends on no clock, nor on how long an environment thinks between two turns.
    """

    def __init__(self, engine: RolloutRole, *, in_waves: bool) -> None:
        self.engine, self.in_waves = engine, in_waves
        self.busy = Busy()
        self._asking: set[int] = set()
        self._begun = itertools.count()
        self._waiting: list[tuple[int, Request]] = []
        self._futures: dict[str, asyncio.Future[Completion]] = {}
        self._wanted = asyncio.Event()
        self._alone = asyncio.Lock()
        # One thread, always the same: an engine may keep state of its thread, as CUDA's current device.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")

    async def asking(self, work: Callable[[Complete], Awaitable[T]]) -> T:
        """What ``work`` comes to, with what it asks of the engine: one request after the other."""
        number = next(self._begun)
        self._asking.add(number)
        try:
            return await work(partial(self._complete, number))
        finally:
            self._asking.remove(number)
            self._wanted.set()

    async def exclusive(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the engine's thread, between two rounds."""
        async with self._alone:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run(self) -> None:
        """Work for ever. What the engine raises ends it, and with it whoever runs it.

        Raises:
            RolloutError: the engine's; it gave what nobody asked for, or lost what it was given.
        """
        while True:
            await self._wanted.wait()
            due = self._due()
            if not due and len(self._futures) == len(self._waiting):
                self._wanted.clear()
                continue
            found, unfinished = await self.exclusive(partial(self._round, due))
            for done in found:
                future = self._futures.pop(done.key, None)
                if future is None:
                    raise RolloutError("the engine gave a completion that nobody asked for", where=done.key)
                future.set_result(done)
            given = len(self._futures) - len(self._waiting)
            if unfinished < given:
                raise RolloutError("the engine has lost requests", got=f"{unfinished} unfinished", expected=given)

    def close(self) -> None:
        """Give the thread up; the engine stays whoever's it was."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _complete(self, number: int, request: Request) -> Completion:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._futures[request.key] = future
        self._waiting.append((number, request))
        self._wanted.set()
        return await future

    def _due(self) -> list[Request]:
        """What is to go in now."""
        if self.in_waves and len(self._waiting) < len(self._asking):
            return []
        due, self._waiting = sorted(self._waiting, key=itemgetter(0)), []
        return [request for _, request in due]

    def _round(self, requests: Sequence[Request]) -> tuple[list[Completion], int]:
        """(completions that ended, how many requests have not)."""
        begun = time.perf_counter()
        found: list[Completion] = []
        with self.busy.working():
            if requests:
                self.engine.submit(requests)
            while not found and self.engine.unfinished and time.perf_counter() - begun < _ROUND_SECONDS:
                found = self.engine.step()
        pulse.beat("rollouts")  # a batch may take longer than a rank may be silent
        return found, self.engine.unfinished
