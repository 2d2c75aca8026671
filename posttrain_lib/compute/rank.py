"""One rank of a job, whatever launched it: the loop, with a heart, ears for signals, and plain words for memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from posttrain_lib.compute.heart import Heart
from posttrain_lib.compute.memory import memory_errors
from posttrain_lib.training import pulse

if TYPE_CHECKING:
    from posttrain_lib.training.job import TrainJob
    from posttrain_lib.training.loop import Events


def run_rank(job: TrainJob, stop_signals: Sequence[str]) -> Events:
    """The loop of ``job.rank`` in this process.

    Raises:
        TrainingError: out of memory, with what to lower. PreemptedError: stopped by a signal, behind a checkpoint.
        Whatever the loop raises.
    """
    with (
        Heart(Path(job.work_dir), job.rank, job.world),
        on_signals(stop_signals, lambda name: pulse.ask_to_stop(f"rank {job.rank} got {name}")),
        memory_errors(job),
    ):
        pulse.beat("imports")
        if job.rollouts is not None:
            from posttrain_lib.rl.run import train_on_rollouts

            return (yield from train_on_rollouts(job, job.rollouts))
        from posttrain_lib.training.loop import train

        return (yield from train(job))


@contextlib.contextmanager
def on_signals(names: Sequence[str], tell: Callable[[str], None]) -> Iterator[None]:
    """Call ``tell`` with a signal's name when it comes; at the second time it does what it did before.

    Only a main thread hears signals; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.getsignal(signal.Signals[name]) for name in names}

    def hear(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        signal.signal(number, before[name] or signal.SIG_DFL)
        tell(name)

    for name in names:
        signal.signal(signal.Signals[name], hear)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler or signal.SIG_DFL)
