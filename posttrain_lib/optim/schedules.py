"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from posttrain_lib.config.train import Schedule


def lr_factor(step: int, schedule: Schedule, total_steps: int) -> float:
    """Factor on the peak learning rate at optimiser step ``step`` (from 1).

    Warm-up is linear and reaches 1 at ``warmup_steps``; the decay ends at ``min_ratio`` with the last step.
    """
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    span = total_steps - schedule.warmup_steps
    done = min(1.0, (step - schedule.warmup_steps) / span) if span > 0 else 1.0
    remaining = 1.0 - done if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * remaining


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
