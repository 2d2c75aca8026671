"""TensorBoard's event files, through torch's writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.schema.reports import StepReport
from posttrain_lib.tracking.figures import figures
from posttrain_lib.tracking.sinks import RunFacts


class TensorBoardSink:
    """A folder ``<folder>/<run name>-<start of its id>``; a run that goes on adds a file to it."""

    name = "tensorboard"
    repeats = False

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._writer: Any = None

    def open(self, facts: RunFacts, earlier: Any) -> str:
        """The folder, which an attempt after this one goes on with."""
        from torch.utils.tensorboard import SummaryWriter

        folder = earlier or str(Path(self.folder).absolute() / f"{facts.name}-{facts.run_id[:8]}")
        self._writer = SummaryWriter(folder)
        if earlier is None:
            self._writer.add_text("config", f"```\n{json.dumps(facts.config, indent=1, default=str)}\n```")
        return folder

    def step(self, report: StepReport) -> None:
        """One scalar a figure; an event as text."""
        for name, value in figures(report).items():
            self._writer.add_scalar(name, value, report.step)
        if report.event:
            self._writer.add_text("event", report.event, report.step)
        self._writer.flush()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The whole run's figures as text."""
        if summary is not None:
            self._writer.add_text("summary", f"```\n{json.dumps(summary, indent=1, default=str)}\n```")
        self._writer.close()
