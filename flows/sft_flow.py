"""Supervised fine-tuning: prepare data -> check serving -> convert model -> train -> evaluate -> export.

    python flows/sft_flow.py run
    python flows/sft_flow.py --config configs/sft/chat_qwen3.yaml run --set train.steps=50
    python flows/sft_flow.py run --set model.from_scratch=null,model.path=SFTFlow/latest
    python flows/sft_flow.py resume

``--help`` after any of them lists what it takes.
"""

# First, because it sets the environment that Metaflow reads when it is imported.
from posttrain_flow import DEFAULT_CONFIG, parse_config  # isort: skip

from metaflow import Config, package_sources
from training_flow import TrainingFlow


@package_sources(["../steps", "../posttrain_lib", "../configs"], suffixes=[".py", ".yaml"])
class SFTFlow(TrainingFlow):
    """Fine-tune a Hugging Face model on conversations, verify it and export it."""

    config = Config("config", default=str(DEFAULT_CONFIG["sft"]), parser=parse_config, help="the run file (YAML)")


if __name__ == "__main__":
    SFTFlow()
