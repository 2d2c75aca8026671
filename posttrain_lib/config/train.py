"""The ``train`` section: batch, objective, optimiser, schedule, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import inf
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain_lib.config.base import Disagreement, Problem, Section


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
    """When to save, how many of the latest to keep (the best is kept besides), where, and how."""

    every_steps: int = Field(100, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_every_steps: int | None = Field(None, ge=1, description="checkpoints of steps that it divides stay as well")
    asynchronous: bool = Field(
        True,
        description="write while training goes on. Each worker's share of weights and optimiser is copied into the "
        "host's memory first, where it takes the room once more",
    )
    folder: str | None = Field(
        None, description="URL of a store's folder (s3://bucket/runs) to write them to; default: the work folder"
    )


class EarlyStopping(Section):
    """Stop when held-out loss has not improved by ``min_delta`` for ``patience`` evaluations."""

    patience: int = Field(3, ge=1)
    min_delta: float = Field(0.0, ge=0)


class Profile(Section):
    """Steps to trace with torch.profiler. It changes no result, and costs the steps named alone."""

    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, description="optimiser steps, from 1")
    memory: bool = Field(False, description="record memory besides: CUDA's allocator snapshot, or a CPU's operators")


class Incidents(Section):
    """What a step leads to whose loss or gradient norm is not finite, or far above those of the steps before it.

    stop: the run ends. skip: the optimiser step is not taken, and the data goes on. roll_back: to the weights of the
    last checkpoint, and on with the data behind the step. Every incident is a line of incidents.jsonl.
    """

    non_finite: Literal["stop", "skip", "roll_back"] = "stop"
    spike: Literal["off", "stop", "skip", "roll_back"] = "off"
    spike_deviations: float = Field(
        10.0,
        gt=0,
        description="a loss is a spike above the window's median by more than this many deviations (of "
        "medians, scaled to a normal distribution's)",
    )
    spike_norm_factor: float = Field(
        10.0, gt=1, description="a gradient norm (before clipping) is a spike above this many medians of the window"
    )
    window: int = Field(64, ge=8, description="accepted steps that a step is held against")
    most: int = Field(10, ge=1, description="incidents of a run; one more and it stops")


class MixedSource(Section):
    """One source's part in a mixture."""

    weight: float | tuple[tuple[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0)]], ...] | None = Field(
        None,
        description="share relative to the others', or a schedule [[step, weight], ...] that is linear in between; "
        "default: the source's size",
    )
    epochs: float | None = Field(None, gt=0, description="passes over the source before it counts as exhausted")
    max_examples: int | None = Field(
        None,
        ge=1,
        description="use at most this many of its examples (what is packed as one counts once), chosen by hash",
    )
    exhausted: Literal["stop", "repeat", "drop"] | None = Field(None, description="default: the mixture's")

    def is_drawn_at_last(self) -> bool:
        """Whether its weight is above 0 when the schedule is over."""
        weight = self.weight[-1][1] if isinstance(self.weight, tuple) else self.weight
        return weight is None or weight > 0

    @model_validator(mode="after")
    def _schedule_rises(self) -> MixedSource:
        if isinstance(self.weight, tuple):
            steps = [step for step, _ in self.weight]
            if not steps or any(after <= before for before, after in pairwise(steps)):
                raise ValueError(f"a weight schedule needs rising steps, got {steps}")
        elif self.weight is not None and not 0 <= self.weight < inf:
            raise ValueError(f"a weight is a number of at least 0, got {self.weight}")
        return self


class Mixture(Section):
    """How the sources share the stream of examples. Without it every example is as likely as any other."""

    by: Literal["samples", "tokens"] = Field("samples", description="what weights are shares of")
    temperature: float = Field(
        1.0, gt=0, description="default weights are size ** (1 / temperature): above 1 evens the sources out"
    )
    exhausted: Literal["stop", "repeat", "drop"] = Field(
        "repeat", description="when a source is through: the run ends, it starts over, or the others share its part"
    )
    sources: dict[str, MixedSource] = Field(default_factory=dict, description="by the names in data.sources")

    def never_ends(self, names: Iterable[str]) -> bool:
        """Whether no policy ends a mixture of these sources: then the run needs a number of steps."""
        shares = [self.sources.get(name, MixedSource()) for name in names]
        policies = [share.exhausted or self.exhausted for share in shares if share.is_drawn_at_last()]
        return "stop" not in policies and "repeat" in policies

    @model_validator(mode="after")
    def _epochs_mean_something(self) -> Mixture:
        for name, source in self.sources.items():
            if source.epochs is not None and (source.exhausted or self.exhausted) == "repeat":
                raise ValueError(
                    f"sources.{name}.epochs would never be used, because the source repeats without end: "
                    "give it exhausted: stop or drop"
                )
        return self


class TrainConfig(Section):
    """One optimiser step = ``rows_per_step`` packed rows of ``row_tokens``, over all workers."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training examples; or give steps")
    row_tokens: int = Field(1024, ge=8, description="length of a packed row")
    rows_per_step: int = Field(8, ge=1, description="packed rows in one optimiser step, over all workers")
    micro_batch_rows: int = Field(1, ge=1, description="rows in one forward of one worker")
    packing_buffer: int = Field(256, ge=1, description="examples the packer may choose from")
    share_prefixes: bool = Field(
        True, description="compute once what several documents of one row begin with, where they are packed together"
    )
    shuffle_window: int | None = Field(
        None,
        ge=1,
        description="shuffle within windows of this many rows, read in sequence; default: over the whole data set",
    )
    mixture: Mixture | None = None
    loss: str | None = Field(
        None, description="a name in posttrain_lib.losses; default: what the recipe's section says, of sft sft"
    )
    loss_options: dict[str, Any] = Field(default_factory=dict)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: float | None = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what a block computes again for its backward: nothing, what is cheap, everything"
    )
    compile: Literal["none", "blocks"] = Field("none", description="torch.compile, each decoder block by itself")
    evaluate_every_steps: int = Field(50, ge=1)
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    early_stopping: EarlyStopping | None = None
    incidents: Incidents = Incidents()
    profile: Profile | None = None
    seed: int = 0

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _says_how_much(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(
                f"say how much: 'none', 'selective' or 'full' ({value} is '{'full' if value else 'none'}')"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.mixture is None and (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.mixture is not None and self.epochs is not None:
            raise ValueError("with a mixture, passes are a matter of each source: give train.mixture.sources.*.epochs")
        if self.steps is not None and self.schedule.warmup_steps > self.steps:
            raise ValueError(f"schedule.warmup_steps ({self.schedule.warmup_steps}) exceeds steps ({self.steps})")
        if self.steps is not None and self.profile is not None and max(self.profile.steps) > self.steps:
            within = sorted({min(step, self.steps) for step in self.profile.steps})
            what = f"profile.steps has {max(self.profile.steps)}, and the run's last step is {self.steps}"
            raise Disagreement([Problem(what, f"set train.profile.steps: {within}, or raise train.steps")])
        return self
