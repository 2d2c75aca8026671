"""From the ``tracking`` section to sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain_lib.registry import resolve
from posttrain_lib.tracking.sinks import Sink

#: ``to`` -> the class that is made with the entry's other fields
SINKS = {
    "tensorboard": "posttrain_lib.adapters.tracker_tensorboard:TensorBoardSink",
    "wandb": "posttrain_lib.adapters.tracker_wandb:WandBSink",
    "mlflow": "posttrain_lib.adapters.tracker_mlflow:MLflowSink",
}


def build_sinks(entries: Sequence[Any]) -> list[Sink]:
    """The sinks of these entries (``config.tracking``). Their hosts are imported when they are opened."""
    made = []
    for number, entry in enumerate(entries):
        kind = resolve(entry.to, SINKS, what="tracker", where=f"tracking[{number}].to")
        made.append(kind(**{name: value for name, value in dict(entry).items() if name != "to"}))
    return made
