"""Traces of chosen steps: ``torch.profiler``'s Chrome trace of each rank, and who holds or asks for memory.

Nothing is wrapped around any other step. Files lie in ``profile/`` of the work folder:

    step-000010-rank-0.trace.json.gz   for chrome://tracing or Perfetto
    step-000010-rank-0.memory.pickle   CUDA: the allocator's snapshot, for pytorch.org/memory_viz
    step-000010-rank-0.memory.json     CPU: bytes that each operator allocated and freed, the largest first; the
                                       profiler's own record, as torch's CPU allocator keeps no history
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch.profiler import profile

FOLDER = "profile"
#: operators in a CPU's memory record
_OPERATORS = 100
#: allocations and frees that a CUDA snapshot remembers
_EVENTS = 100_000


class ProfileSettings(Protocol):
    """What ``train.profile`` says; anything with these attributes."""

    @property
    def steps(self) -> Sequence[int]:
        """Optimiser steps, from 1."""
        ...

    @property
    def memory(self) -> bool:
        """Whether to record memory besides."""
        ...


class StepProfiler:
    """Profiles the steps that ``settings`` names; None: none."""

    def __init__(
        self, settings: ProfileSettings | None, work_dir: str | Path, *, rank: int, device: torch.device
    ) -> None:
        self.settings, self.rank, self.device = settings, rank, device
        self.folder = Path(work_dir) / FOLDER

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around optimiser step ``number``."""
        settings = self.settings
        if settings is None or number not in settings.steps:
            yield
            return
        from torch.profiler import ProfilerActivity, profile  # half a second that other runs need not pay

        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{number:06d}-rank-{self.rank}"
        cuda = self.device.type == "cuda"
        snapshot = settings.memory and cuda
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        if snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        try:
            with profile(activities=activities, profile_memory=settings.memory and not cuda) as profiler:
                yield
                if cuda:
                    torch.cuda.synchronize(self.device)
            if snapshot:
                torch.cuda.memory._dump_snapshot(str(self.folder / f"{name}.memory.pickle"))
        finally:
            if snapshot:
                torch.cuda.memory._record_memory_history(enabled=None)
        profiler.export_chrome_trace(str(self.folder / f"{name}.trace.json.gz"))
        if settings.memory and not cuda:
            text = json.dumps(_by_operator(profiler), indent=1)
            (self.folder / f"{name}.memory.json").write_text(text + "\n", encoding="utf-8")


def _by_operator(profiler: profile) -> list[dict[str, object]]:
    """Net bytes that each operator itself allocated (below 0: freed), by size."""
    events = [event for event in profiler.key_averages() if event.self_cpu_memory_usage]
    events.sort(key=lambda event: -abs(event.self_cpu_memory_usage))
    return [
        {"operator": event.key, "calls": event.count, "net_bytes": int(event.self_cpu_memory_usage)}
        for event in events[:_OPERATORS]
    ]
