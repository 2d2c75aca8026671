"""Everything that a training run is, at a step: what a checkpoint holds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from posttrain_lib.models.lora import LoraDecoder
from posttrain_lib.schema.trajectory import TRAJECTORY

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder


class Position(Protocol):
    """Where a run's data stands: of a loader, or of a controller."""

    def state(self) -> dict[str, Any]:
        """JSON-ready."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position given by :meth:`state`."""


@dataclass
class Progress:
    """Counters beside the tensors; JSON-ready.

    ``best_step`` and ``best_held_out`` are of the lowest held-out loss after a step, ``first_held_out`` is the one
    before training. ``patience_held_out`` is the value that early stopping wants beaten, and ``stale_evaluations``
    how many evaluations have failed to. ``incidents`` counts steps that went wrong; ``recent_losses`` and
    ``recent_norms`` are of the last steps that were taken, where spikes are looked for (see ``training.incidents``).
    """

    step: int = 0
    tokens_seen: int = 0
    first_held_out: float | None = None
    best_held_out: float | None = None
    best_step: int | None = None
    patience_held_out: float | None = None
    stale_evaluations: int = 0
    stopped_early: bool = False
    incidents: int = 0
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)


@dataclass
class TrainState:
    """Model, optimiser, data position and counters. The learning rate is a function of ``progress.step``.

    ``trajectory`` is what the weights depend on besides their start (see ``schema.trajectory``); ``report`` is the last
    step's report, so that a resumed run can say again what a killed one may not have got out.
    """

    model: Decoder
    optimizer: torch.optim.Optimizer
    loader: Position
    trajectory: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    report: dict[str, Any] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this rank's memory, by name; shards stay shards (DTensor), nothing is copied.

        ``model.<parameter>`` (of a model with adapters those alone: the frozen base is the folder's that the job
        names), ``optimizer.<parameter>.<key>`` and, where a group's option is a tensor, ``optimizer.<group>.<option>``.
        """
        tensors: dict[str, Tensor] = {}
        # Its hooks also bring parameters that FSDP2 left whole after an evaluation back to shards.
        for name, value in self.model.state_dict(keep_vars=True).items():
            frozen = isinstance(value, nn.Parameter) and not value.requires_grad
            if isinstance(value, Tensor) and not (frozen and isinstance(self.model, LoraDecoder)):
                tensors[f"model.{name}"] = value.detach()
        for name, values in self._optimizer_state().items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value.detach()
        return tensors

    def optimizer_numbers(self) -> dict[str, dict[str, Any]]:
        """The optimiser's plain numbers by parameter or group, JSON-ready: counters, and what an optimiser tunes as it
        goes. Python writes a float so that it is read back with the same bits."""
        return {
            name: {key: value for key, value in values.items() if type(value) in (int, float)}
            for name, values in self._optimizer_state().items()
        }

    def make_optimizer_state(self, stored: Iterable[str], numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Give the optimiser the state tensors that a checkpoint has values for, and its plain numbers.

        State is made by a step with a gradient of zero, one parameter at a time, so that no more memory is needed than
        for one gradient. That step may change the parameters, whose values come from the checkpoint as well.

        Args:
            stored: names of the checkpoint's tensors.
            numbers: of :meth:`optimizer_numbers`.
        """
        names = {name.removeprefix("optimizer.").rpartition(".")[0] for name in stored if name.startswith("optimizer.")}
        names |= {name for name, values in numbers.items() if values}
        for name, parameter in self.model.named_parameters():
            if name not in names:
                self.optimizer.state.pop(parameter, None)
            elif parameter.requires_grad and not self.optimizer.state.get(parameter):
                self.optimizer.zero_grad(set_to_none=True)
                parameter.grad = torch.zeros_like(parameter)
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, values in self._optimizer_state().items():
            # A group that the layout that wrote it did not have is told what the first of its kind was.
            values.update(numbers.get(name, numbers.get(values.get("kind", name), {})))

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Parameter -> its state, group -> its options; the optimiser's own dicts. A group's name is its kind (see
        ``optim.parameter_groups``), with a number behind it where the layout has several of one."""
        found: dict[str, dict[str, Any]] = {}
        seen: Counter[str] = Counter()
        for number, group in enumerate(self.optimizer.param_groups):
            kind = group.get("kind", f"group-{number}")
            found[f"{kind}.{seen[kind]}" if seen[kind] else kind] = group
            seen[kind] += 1
        for name, parameter in self.model.named_parameters():
            if parameter in self.optimizer.state:
                found[name] = self.optimizer.state[parameter]
        return found


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
