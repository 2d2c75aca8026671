"""A flow of SFTFlow's name that finds its model and exports as SFTFlow does, in seconds. Needs flows/ on the path."""

# isort: skip_file
from posttrain_flow import plain_errors, this_run

import os

from metaflow import FlowSpec, Parameter, current, step

from posttrain_lib.errors import DataError
from steps import pipeline
from tests.support.exported import RAW, publish_run


def fail_in(name: str) -> None:
    """Where $FAIL_IN says so: environment, because a resumed run keeps its parameters."""
    if os.environ.get("FAIL_IN") == name:
        raise DataError(f"asked to fail in {name}")
    if os.environ.get("FAIL_ONCE_IN") == name and current.retry_count == 0:
        raise RuntimeError(f"asked to fail once in {name}")


class SFTFlow(FlowSpec):
    """start: look up the model; export: publish; end: nothing."""

    model = Parameter("model", default="folder", help="model.path")
    words = Parameter("words", default="weights", help="what is exported")

    @step
    def start(self):
        """As the flows do it."""
        with plain_errors():
            self.run_config = pipeline.resolve(RAW, f"model.path={self.model}", this_run())
            fail_in("start")
        self.next(self.export)

    @step
    def export(self):
        """The three steps that a report looks at."""
        with plain_errors():
            fail_in("export")
            self.manifests = publish_run(words=self.words)
        self.next(self.end)

    @step
    def end(self):
        """The gates' place."""
        with plain_errors():
            fail_in("end")


if __name__ == "__main__":
    SFTFlow()
