"""A flow whose steps have a manifest more each, and whose last one is killed."""

import os
import signal

from metaflow import FlowSpec, step


class GrowingFlow(FlowSpec):
    """start, second, third: one manifest more each; end: killed before it has any."""

    @step
    def start(self):
        """The first."""
        self.run_config = {"name": "growing"}
        self.manifests = {"start": {}}
        self.next(self.second)

    @step
    def second(self):
        """The second."""
        self.manifests = {**self.manifests, "second": {}}
        self.next(self.third)

    @step
    def third(self):
        """The third."""
        self.manifests = {**self.manifests, "third": {}}
        self.next(self.end)

    @step
    def end(self):
        """As the machine's memory may end it."""
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    GrowingFlow()
