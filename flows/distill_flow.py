"""Knowledge distillation: prepare data -> convert model -> store the teacher's words -> train -> evaluate -> export.

    python flows/distill_flow.py run
    python flows/distill_flow.py --config configs/distill/default.yaml run --set train.steps=50
    python flows/distill_flow.py resume

``--help`` after any of them lists what it takes.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import DEFAULT_CONFIG, parse_config  # isort: skip

from metaflow import Config, package_sources
from training_flow import ComparingFlow


@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml"])
class DistillFlow(ComparingFlow):
    """Train a model on the distributions of a teacher, verify it and export it."""

    config = Config("config", default=str(DEFAULT_CONFIG["distill"]), parser=parse_config, help="the run file (YAML)")


if __name__ == "__main__":
    DistillFlow()
