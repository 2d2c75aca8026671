"""The rollout engine as something to be awaited: many ask, one thread works it.

    complete(request) --> waiting --submit--> engine.step, step, ... --> the request's future
    exclusive(work)   --> between two rounds of steps, alone with the engine

Consumes: requests. Produces: completions. Waits for: requests. Unblocked by: :meth:`EnginePump.complete`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from posttrain_lib.errors import RolloutError
from posttrain_lib.rl.figures import Busy
from posttrain_lib.training import pulse

if TYPE_CHECKING:
    from posttrain_lib.rl.roles import RolloutRole
    from posttrain_lib.schema.rollouts import Completion, Request

T = TypeVar("T")

#: how long the engine works before others get a word in: new requests, new weights, a stop
_ROUND_SECONDS = 0.05


class EnginePump:
    """Drives an engine for whoever awaits completions. Use it in one event loop.

    Requests that are asked for before the loop gets to run again are submitted together, in the order of asking: what
    the engine computes side by side then depends on no clock.
    """

    def __init__(self, engine: RolloutRole) -> None:
        self.engine = engine
        self.busy = Busy()
        self._waiting: list[Request] = []
        self._futures: dict[str, asyncio.Future[Completion]] = {}
        self._wanted = asyncio.Event()
        self._alone = asyncio.Lock()
        # One thread, always the same: an engine may keep state of its thread, as CUDA's current device.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")

    async def complete(self, request: Request) -> Completion:
        """The completion of a request."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._futures[request.key] = future
        self._waiting.append(request)
        self._wanted.set()
        return await future

    async def exclusive(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the engine's thread, between two rounds."""
        async with self._alone:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def run(self) -> None:
        """Work for ever. What the engine raises ends it, and with it whoever runs it."""
        while True:
            await self._wanted.wait()
            waiting, self._waiting = self._waiting, []
            for done in await self.exclusive(partial(self._round, waiting)):
                future = self._futures.pop(done.key, None)
                if future is None:
                    raise RolloutError("the engine gave a completion that nobody asked for", where=done.key)
                future.set_result(done)
            if not self._futures:
                self._wanted.clear()

    def close(self) -> None:
        """Give the thread up; the engine stays whoever's it was."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _round(self, requests: Sequence[Request]) -> list[Completion]:
        begun = time.perf_counter()
        found: list[Completion] = []
        with self.busy.working():
            if requests:
                self.engine.submit(requests)
            while not found and self.engine.unfinished and time.perf_counter() - begun < _ROUND_SECONDS:
                found = self.engine.step()
        pulse.beat("rollouts")  # a batch may take longer than a rank may be silent
        return found
