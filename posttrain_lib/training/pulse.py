"""What a rank is doing, said by its loop as it goes, and whether it has been asked to stop.

One process runs one rank, so its pulse is the process's. The loop writes here and knows nothing of who reads: a
launcher copies the pulse to where a watchdog sees it, and asks for a stop when the machine is to be given back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

#: moments kept of the beginning: enough for everything before the first few steps
_KEPT = 40


@dataclass
class Pulse:
    """``beats`` counts movements; ``timeline`` holds (what began, seconds since the epoch) of the first of them.
    ``stop``: why the rank is to stop after its step, None where it is not."""

    step: int = 0
    phase: str = "starting"
    beats: int = 0
    stop: str | None = None
    timeline: list[tuple[str, float]] = field(default_factory=list)


_pulse = Pulse()


def begin() -> Pulse:
    """A fresh pulse for a rank that starts in this process."""
    global _pulse
    _pulse = Pulse()
    return _pulse


def current() -> Pulse:
    """The pulse of this process's rank."""
    return _pulse


def beat(phase: str, step: int | None = None) -> None:
    """The rank begins ``phase`` (of ``step``, where it has changed)."""
    _pulse.phase = phase
    if step is not None:
        _pulse.step = step
    _pulse.beats += 1
    if len(_pulse.timeline) < _KEPT:
        _pulse.timeline.append((phase, time.time()))


def moved() -> None:
    """A part of the phase is done: one that takes long is no hang."""
    _pulse.beats += 1


def ask_to_stop(reason: str) -> None:
    """Let this process's rank finish its step, checkpoint and stop; all other ranks stop with it."""
    _pulse.stop = _pulse.stop or reason


def stop_reason() -> str | None:
    """Why the rank was asked to stop; None if it was not."""
    return _pulse.stop
