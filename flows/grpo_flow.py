"""Reinforcement learning from graded answers: prepare prompts -> convert model -> warm start -> train -> evaluate ->
export.

    python flows/grpo_flow.py run
    python flows/grpo_flow.py --config configs/grpo/default.yaml run --set train.steps=50
    python flows/grpo_flow.py resume

``--help`` after any of them lists what it takes.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import DEFAULT_CONFIG, parse_config, plain_errors  # isort: skip

from metaflow import Config, package_sources, step
from training_flow import TrainingFlow

from steps import pipeline


@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml"])
class GRPOFlow(TrainingFlow):
    """Train a model on its own answers, verify it and export it."""

    config = Config("config", default=str(DEFAULT_CONFIG["grpo"]), parser=parse_config, help="the run file (YAML)")

    @step
    def convert_model(self):
        """Verify our definition of the model against the reference implementation."""
        with plain_errors():
            self.manifests = pipeline.advance("convert_model", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.warm_start)

    @step
    def warm_start(self):
        """Fine-tune it on demonstrations first, where the run file has some."""
        with plain_errors():
            if self.run_config["grpo"]["warm_start"] is not None:
                self.manifests = pipeline.advance("warm_start", self.run_config, self.manifests, reuse=self.reuse)
        self.next(self.train)


if __name__ == "__main__":
    GRPOFlow()
