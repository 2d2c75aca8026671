"""The reward role as something to be awaited: groups hand answers in, one thread has them graded.

Consumes: answers. Produces: grades. Waits for: answers. Unblocked by: :meth:`GradingDesk.grade`. What lies on the desk
when the graders are free goes to them at once, as one call: they have workers of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from posttrain_lib.rl.figures import Busy

if TYPE_CHECKING:
    from posttrain_lib.rl.roles import RewardRole
    from posttrain_lib.schema.rollouts import Answer, Grade


class GradingDesk:
    """Asks a reward role for whoever awaits grades. Use it in one event loop."""

    def __init__(self, reward: RewardRole) -> None:
        self.reward = reward
        self.busy = Busy()
        self._waiting: list[tuple[Sequence[Answer], asyncio.Future[list[Grade]]]] = []
        self._wanted = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")

    async def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """A grade for each answer, in order."""
        future: asyncio.Future[list[Grade]] = asyncio.get_running_loop().create_future()
        self._waiting.append((answers, future))
        self._wanted.set()
        return await future

    async def run(self) -> None:
        """Work for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            waiting, self._waiting = self._waiting, []
            answers = [answer for part, _ in waiting for answer in part]
            with self.busy.working():
                grades = await loop.run_in_executor(self._thread, self.reward.grade, answers)
            for part, future in waiting:
                own, grades = grades[: len(part)], grades[len(part) :]
                if not future.done():
                    future.set_result(own)

    def close(self) -> None:
        """End the graders, for what they are at may take all their deadlines together, and give the thread up."""
        self.reward.close()
        self._thread.shutdown(wait=True, cancel_futures=True)
