"""A whole run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Section
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.config.data import DataConfig
from posttrain_lib.config.evaluation import EvaluationConfig
from posttrain_lib.config.export import ExportConfig
from posttrain_lib.config.model import ModelConfig
from posttrain_lib.config.train import TrainConfig


class RunConfig(Section):
    """Everything a run depends on. The resolved form is stored with every run."""

    recipe: Literal["sft"] = "sft"
    name: str = Field(
        min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="short name of the run, for tags and reports"
    )
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    compute: ComputeConfig = ComputeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        train, data = self.train, self.data
        if data.max_example_tokens > train.row_tokens:
            raise ValueError(
                f"data.max_example_tokens ({data.max_example_tokens}) exceeds train.row_tokens ({train.row_tokens}): "
                "an example could not fit in a packed row; lower the first or raise the second"
            )
        share = self.compute.workers * train.micro_batch_rows
        if train.rows_per_step % share:
            raise ValueError(
                f"train.rows_per_step ({train.rows_per_step}) is not a multiple of compute.workers x "
                f"train.micro_batch_rows ({self.compute.workers} x {train.micro_batch_rows} = {share})"
            )
        if self.compute.launcher == "in_process" and self.compute.workers > 1:
            raise ValueError("compute.launcher 'in_process' runs one worker; use 'ray' for more")
        if self.data.tokenizer is not None and self.model.from_scratch is not None:
            raise ValueError(
                "data.tokenizer and model.from_scratch both name a tokenizer; "
                "give it as model.from_scratch.tokenizer alone"
            )
        return self
