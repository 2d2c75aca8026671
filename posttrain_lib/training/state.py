"""Everything that a training run is, at a step: what a checkpoint holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from posttrain_lib.models.lora import LoraDecoder

if TYPE_CHECKING:
    import torch

    from posttrain_lib.data.loader import PackedLoader
    from posttrain_lib.models.decoder import Decoder

#: Fields of the train section that decide the sequence of weights. A checkpoint made under others is of another run.
#: Layout (micro-batches, workers, recomputation) and habits (how often to save or evaluate) may change on resume.
TRAJECTORY = (
    "steps",
    "epochs",
    "row_tokens",
    "rows_per_step",
    "packing_buffer",
    "share_prefixes",
    "shuffle_window",
    "mixture",
    "loss",
    "loss_options",
    "optimizer",
    "schedule",
    "clip_norm",
    "precision",
    "seed",
)


@dataclass
class Progress:
    """Counters beside the tensors; JSON-ready.

    ``best_step`` and ``best_held_out`` are of the lowest held-out loss after a step, ``first_held_out`` is the one
    before training. ``patience_held_out`` is the value that early stopping wants beaten, and ``stale_evaluations``
    how many evaluations have failed to.
    """

    step: int = 0
    tokens_seen: int = 0
    first_held_out: float | None = None
    best_held_out: float | None = None
    best_step: int | None = None
    patience_held_out: float | None = None
    stale_evaluations: int = 0
    stopped_early: bool = False


@dataclass
class TrainState:
    """Model, optimiser, data position and counters. The learning rate is a function of ``progress.step``.

    ``trajectory`` is what the weights depend on besides their start (see :data:`TRAJECTORY`); ``report`` is the last
    step's report, so that a resumed run can say again what a killed one may not have got out.
    """

    model: Decoder
    optimizer: torch.optim.Optimizer
    loader: PackedLoader
    trajectory: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    report: dict[str, Any] | None = None

    def tensors(self) -> dict[str, Any]:
        """State dicts for a distributed checkpoint; shards stay shards. Of a model with adapters, those alone: the
        frozen base is the folder's that the job names."""
        return {
            "model": get_model_state_dict(self.model, options=self._options()),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def load_tensors(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`tensors`."""
        set_model_state_dict(self.model, state["model"], options=self._options())
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def _options(self) -> StateDictOptions:
        adapted = isinstance(self.model, LoraDecoder)
        return StateDictOptions(ignore_frozen_params=adapted, strict=not adapted)


def trajectory_of(train: Any) -> dict[str, Any]:
    """The :data:`TRAJECTORY` fields of a train section as plain JSON values."""
    return {name: _plain(getattr(train, name)) for name in TRAJECTORY}


def _plain(value: Any) -> Any:
    """Sections (pydantic, dataclass or namespace) to mappings, tuples to lists: equal before and after JSON."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dict__"):
        return _plain(vars(value))
    return value
