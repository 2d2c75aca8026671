"""Calls of a user's code, each with a deadline: what it does costs its own episode and no more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from posttrain_lib.rl.rewards.worker import said

T = TypeVar("T")


class CallFailed(Exception):
    """The call raised, or was late; the text says how."""


async def within(seconds: float, call: Callable[[], T]) -> T:
    """What the call gives, from a thread of its own.

    A thread cannot be ended: one that is late runs on, unheard, and the process does not wait for it at its end. Code
    that never gives the interpreter up holds up everything; such code belongs into a process that it starts itself.

    Raises:
        CallFailed: it raised, or took longer.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[list[T], str]] = loop.create_future()

    def settle(given: list[T], failure: str) -> None:
        if not done.done():
            done.set_result((given, failure))

    def work() -> None:
        given, failure = [], ""
        try:
            given.append(call())
        except BaseException as error:  # whatever a user's code raises, SystemExit too
            failure = f"raised {said(error)}"
        with contextlib.suppress(RuntimeError):  # late, and the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, given, failure)

    # Not of a pool: late calls would use its threads up, and the interpreter would wait for them.
    threading.Thread(target=work, name="environment", daemon=True).start()
    finished, _ = await asyncio.wait({done}, timeout=seconds)
    if not finished:
        done.cancel()
        raise CallFailed(f"took more than {seconds:g} seconds")
    given, failure = done.result()
    if failure:
        raise CallFailed(failure)
    return given[0]
