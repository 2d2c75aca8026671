"""Learning from preferences: prepare pairs -> convert model -> score with the reference -> train -> evaluate -> export.

    python flows/dpo_flow.py run
    python flows/dpo_flow.py --config configs/dpo/default.yaml run --set train.steps=50
    python flows/dpo_flow.py resume

``--help`` after any of them lists what it takes.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import DEFAULT_CONFIG, parse_config  # isort: skip

from metaflow import Config, package_sources
from training_flow import ComparingFlow


@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml"])
class DPOFlow(ComparingFlow):
    """Train a model on pairs of a better and a worse answer, verify it and export it."""

    config = Config("config", default=str(DEFAULT_CONFIG["dpo"]), parser=parse_config, help="the run file (YAML)")


if __name__ == "__main__":
    DPOFlow()
