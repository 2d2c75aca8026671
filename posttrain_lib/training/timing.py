"""Where the time of a step goes: clocks on a CPU, events on a GPU, which the host never waits for.

A step's time runs from its beginning to the next one's. What is done in it is marked by kind; the kinds do not overlap
(one inside another is taken from the outer one), so that together with ``other`` they are the whole.

* On a CPU work is done when the call returns: the split of a step is known when it ends.
* On CUDA marks are events in the stream, so that the times are the device's and a gap in which it waits for the host
  lies in the kind that the host was in. They are read when the next step has ended, long after they have happened.

*Communication* is the time in which the thread of the step is blocked in collectives: in the ``wait`` of their handles
(torch.distributed's own, FSDP2's) and in that of functional collectives (DTensor, tensor parallelism). Collectives that
go on beside the computation cost what of them is waited for. On CUDA a wait blocks no host and FSDP2 orders streams by
events of its own: not measured there, and left out; ``train.profile`` shows them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

Kind = Literal["data", "forward", "backward", "optimizer", "communication", "evaluation", "checkpoint"]
KINDS: tuple[Kind, ...] = (
    "data", "forward", "backward", "optimizer", "communication", "evaluation", "checkpoint",
)  # fmt: skip


class Mark(Protocol):
    """A moment."""

    def until(self, later: Any) -> float:
        """Seconds from here to a later one of the same kind."""
        ...


@dataclass(frozen=True)
class _Moment:
    """Of the host's clock."""

    seconds: float = field(default_factory=time.perf_counter)

    def until(self, later: _Moment) -> float:
        return later.seconds - self.seconds


class _DeviceMoment:
    """Of the current stream of a CUDA device."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def until(self, later: _DeviceMoment) -> float:
        later.event.synchronize()  # it has happened: a step later, or at the end of the run
        return float(self.event.elapsed_time(later.event)) / 1000


@dataclass(frozen=True)
class Split:
    """Seconds of a step by kind, with ``other``; only kinds that took place. They sum to ``total``."""

    step: int
    total: float
    seconds: dict[str, float]


@dataclass
class _Open:
    """A step whose parts are still being marked: (kind, begin, end), and which part lies directly in which."""

    step: int
    begin: Mark
    parts: list[tuple[Kind, Mark, Mark, int | None]] = field(default_factory=list)


class StepClock:
    """Marks the parts of steps.

    Args:
        device: whose time it is. communication: whether to look for collectives at all (there are several ranks).
    """

    def __init__(self, device: torch.device, *, communication: bool = False) -> None:
        self.on_device = device.type == "cuda"
        self.waits_counted = communication and not self.on_device
        self._mark: Callable[[], Mark] = _DeviceMoment if self.on_device else _Moment
        self._open: _Open | None = None
        self._unread: tuple[_Open, Mark] | None = None
        self._stack: list[int] = []

    def begin(self, step: int) -> None:
        """A step begins, and the one before ends. Parts marked before the first step are nobody's."""
        now = self._mark()
        if self._open is not None:
            self._unread = (self._open, now)
        self._open = _Open(step, now)

    @contextlib.contextmanager
    def part(self, kind: Kind) -> Iterator[None]:
        """What is done inside is of this kind."""
        step = self._open
        if step is None:
            yield
            return
        number, outer = len(step.parts), self._stack[-1] if self._stack else None
        begin = self._mark()
        step.parts.append((kind, begin, begin, outer))
        self._stack.append(number)
        try:
            yield
        finally:
            self._stack.pop()
            step.parts[number] = (kind, begin, self._mark(), outer)

    def split(self) -> Split | None:
        """Of the newest step that can be read without waiting: on a CPU the one that is just ending, on CUDA the one
        before. None where there is none yet."""
        if self.on_device:
            return None if self._unread is None else _split(*self._unread)
        return None if self._open is None else _split(self._open, self._mark())

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """While inside, waits for collectives on this thread are marked as communication."""
        if not self.waits_counted:
            yield
            return
        from torch.distributed import _functional_collectives as functional

        places = [(dist.Work, "wait"), (functional, "wait_tensor")]
        before = [getattr(owner, name) for owner, name in places]
        for (owner, name), original in zip(places, before, strict=True):
            setattr(owner, name, self._marked(original))
        try:
            yield
        finally:
            for (owner, name), original in zip(places, before, strict=True):
                setattr(owner, name, original)

    def _marked(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        here = threading.get_ident()

        @wraps(wait)
        def marked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:  # a checkpoint written beside the training
                return wait(*args, **kwargs)
            with self.part("communication"):
                return wait(*args, **kwargs)

        return marked


#: for a step that nobody times
NO_CLOCK = StepClock(torch.device("cpu"))


def _split(step: _Open, end: Mark) -> Split:
    total = step.begin.until(end)
    spans = [begin.until(finish) for _, begin, finish, _ in step.parts]
    seconds: dict[str, float] = {}
    for (kind, _, _, outer), span in zip(step.parts, spans, strict=True):
        seconds[kind] = seconds.get(kind, 0.0) + span
        if outer is not None:
            around = step.parts[outer][0]
            seconds[around] = seconds.get(around, 0.0) - span
    seconds["other"] = total - sum(seconds.values())
    return Split(step.step, total, seconds)
