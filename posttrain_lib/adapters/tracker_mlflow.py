"""MLflow, through its client: a server's address, or a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from posttrain_lib.schema.reports import StepReport
from posttrain_lib.tracking.figures import figures, flat
from posttrain_lib.tracking.sinks import RunFacts

#: MLflow's bounds: parameters of one call, and characters of a value
_PARAMETERS = 100
_CHARACTERS = 500


class MLflowSink:
    """One run of an experiment; a run that goes on is the same run."""

    name = "mlflow"
    repeats = False

    def __init__(self, uri: str | None, experiment: str) -> None:
        self.uri, self.experiment = uri, experiment
        self._client: Any = None
        self._run_id = ""

    def open(self, facts: RunFacts, earlier: Any) -> str:
        """The id of MLflow's run."""
        import os

        if self.uri is not None and self.uri.startswith("file:"):
            # From 3.13 on MLflow wants to be told that a folder of files is meant, which is what "file:" says.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(self.uri)
        if earlier is not None:
            self._client.update_run(earlier, status="RUNNING")
            self._run_id = earlier
            return str(earlier)
        experiment = self._client.get_experiment_by_name(self.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self.experiment)
        self._run_id = self._client.create_run(number, run_name=facts.name).info.run_id
        self._client.set_tag(self._run_id, "posttrain.run_id", facts.run_id)
        config = flat(facts.config)
        parameters = [Param(_spelled(name), str(value)[:_CHARACTERS]) for name, value in config.items()]
        for first in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._run_id, params=parameters[first : first + _PARAMETERS])
        return self._run_id

    def step(self, report: StepReport) -> None:
        """All figures of a step in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_spelled(name), value, now, report.step) for name, value in figures(report).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """How the run ended, and the summary as a file of it, which may have nowhere to go."""
        self._client.set_terminated(self._run_id, "FINISHED" if summary is not None else "FAILED")
        if summary is not None:
            self._client.log_dict(self._run_id, dict(summary), "summary.json")


def _spelled(name: str) -> str:
    """MLflow takes letters, digits, ``_ - . /`` and blanks; a source's name may have others, or a gate's."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)
