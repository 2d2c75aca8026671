"""Reward modelling: prepare pairs -> check serving -> convert model -> train -> evaluate -> export.

    python flows/reward_flow.py run
    python flows/reward_flow.py --config configs/reward/default.yaml run --set train.steps=50
    python flows/reward_flow.py resume

``--help`` after any of them lists what it takes.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import DEFAULT_CONFIG, parse_config  # isort: skip

from metaflow import Config, package_sources
from training_flow import TrainingFlow


@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml"])
class RewardFlow(TrainingFlow):
    """Train a model that scores answers, verify it and export it as a sequence classification folder."""

    config = Config("config", default=str(DEFAULT_CONFIG["reward"]), parser=parse_config, help="the run file (YAML)")


if __name__ == "__main__":
    RewardFlow()
