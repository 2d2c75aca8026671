"""Weights & Biases, online or in a folder to be sent later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_lib.schema.reports import StepReport
from posttrain_lib.tracking.figures import figures, flat
from posttrain_lib.tracking.sinks import RunFacts


class WandBSink:
    """One run of a project. A run that goes on keeps its id; offline that is one more folder with the same id, which
    ``wandb sync`` puts together."""

    name = "wandb"
    repeats = False

    def __init__(self, project: str, entity: str | None, group: str | None, mode: str, folder: str | None) -> None:
        self.project, self.entity, self.group, self.mode, self.folder = project, entity, group, mode, folder
        self._run: Any = None

    def open(self, facts: RunFacts, earlier: Any) -> str:
        """The id of the run."""
        import wandb

        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        run_id = earlier or facts.run_id[:32]
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=facts.name,
            id=run_id,
            resume="allow" if self.mode == "online" else None,
            mode=self.mode,  # type: ignore[arg-type]
            dir=self.folder,
            config=dict(facts.config),
            reinit="create_new",  # other runs of this process are not ours to end
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        self._run.define_metric("*", step_metric="step")  # its own count could not go back with a run that does
        return str(run_id)

    def step(self, report: StepReport) -> None:
        """All figures of a step in one line."""
        values: dict[str, Any] = {"step": report.step, **figures(report)}
        if report.event:
            values["event"] = report.event
        self._run.log(values)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """The summary, and an exit code that says whether the run came to its end. W&B's own process may still be
        writing the last of them into the folder when this returns; the end of the driver's process waits for it."""
        if summary is not None:
            self._run.summary.update(flat(summary))
        self._run.finish(exit_code=0 if summary is not None else 1)
