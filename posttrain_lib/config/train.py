"""The ``train`` section: batch, objective, optimiser, schedule, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain_lib.config.base import Section


class Optimizer(Section):
    """An optimiser by name: a key of posttrain_lib.optim, or ``module:attribute`` of a kept library."""

    name: str = "adamw"
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    options: dict[str, Any] = Field(default_factory=dict, description="further keyword arguments of the optimiser")


class Schedule(Section):
    """Learning rate over steps: linear warm-up, then the named decay to ``min_ratio`` of the peak."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_ratio: float = Field(0.0, ge=0, le=1)


class CheckpointPolicy(Section):
    """When to save, and how many of the latest to keep (the best is kept besides)."""

    every_steps: int = Field(100, ge=1)
    keep_last: int = Field(2, ge=1)


class EarlyStopping(Section):
    """Stop when held-out loss has not improved by ``min_delta`` for ``patience`` evaluations."""

    patience: int = Field(3, ge=1)
    min_delta: float = Field(0.0, ge=0)


class TrainConfig(Section):
    """One optimiser step = ``rows_per_step`` packed rows of ``row_tokens``, over all workers."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training examples; or give steps")
    row_tokens: int = Field(1024, ge=8, description="length of a packed row")
    rows_per_step: int = Field(8, ge=1, description="packed rows in one optimiser step, over all workers")
    micro_batch_rows: int = Field(1, ge=1, description="rows in one forward of one worker")
    packing_buffer: int = Field(256, ge=1, description="examples the packer may choose from")
    loss: str = Field("sft", description="a name in posttrain_lib.losses")
    loss_options: dict[str, Any] = Field(default_factory=dict)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: float | None = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    evaluate_every_steps: int = Field(50, ge=1)
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    early_stopping: EarlyStopping | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.steps is not None and self.schedule.warmup_steps > self.steps:
            raise ValueError(f"schedule.warmup_steps ({self.schedule.warmup_steps}) exceeds steps ({self.steps})")
        return self
