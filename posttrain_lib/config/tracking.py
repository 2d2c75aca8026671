"""The ``tracking`` section: where a run's figures go besides its own metrics.jsonl."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_lib.config.base import TaggedSection


class TensorBoard(TaggedSection):
    """Event files for TensorBoard."""

    to: Literal["tensorboard"]
    folder: str = Field(description="a folder of the run's name is made in it; relative to where the run is started")


class WandB(TaggedSection):
    """Weights & Biases. ``offline`` writes a folder that ``wandb sync`` sends later."""

    to: Literal["wandb"]
    project: str = "posttrain"
    entity: str | None = None
    group: str | None = None
    mode: Literal["online", "offline"] = "online"
    folder: str | None = Field(None, description="where its files go; default: ./wandb")


class MLflow(TaggedSection):
    """MLflow, a server or a folder."""

    to: Literal["mlflow"]
    uri: str | None = Field(
        None, description="http(s)://..., or file:folder; default: MLflow's own MLFLOW_TRACKING_URI"
    )
    experiment: str = "posttrain"


Tracker = Annotated[TensorBoard | WandB | MLflow, Field(discriminator="to")]
