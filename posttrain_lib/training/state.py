"""Everything that a training run is, at a step: what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

if TYPE_CHECKING:
    import torch

    from posttrain_lib.data.loader import PackedLoader
    from posttrain_lib.models.decoder import Decoder


@dataclass
class Progress:
    """Counters beside the tensors; JSON-ready.

    ``best_step`` and ``best_held_out`` are of the lowest held-out loss so far; ``stale_evaluations`` counts
    evaluations since it fell; ``first_held_out`` is the loss before training.
    """

    step: int = 0
    tokens_seen: int = 0
    first_held_out: float | None = None
    best_held_out: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    stopped_early: bool = False


@dataclass
class TrainState:
    """Model, optimiser, data position and counters. The learning rate is a function of ``progress.step``."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    loader: PackedLoader
    progress: Progress = field(default_factory=Progress)

    def tensors(self) -> dict[str, Any]:
        """State dicts for a distributed checkpoint; shards stay shards."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def load_tensors(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`tensors`."""
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
