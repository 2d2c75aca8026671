"""Optimisers by name, learning-rate schedules, gradient clipping."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from posttrain_lib.errors import ConfigError
from posttrain_lib.registry import check_options, resolve

if TYPE_CHECKING:
    from posttrain_lib.config.train import Optimizer as OptimizerConfig

OPTIMIZERS: dict[str, str] = {
    "adamw": "torch.optim:AdamW",
    "sgd": "torch.optim:SGD",
}
#: Arguments beyond the config's: one pass over all parameters. SGD's fused pass cannot take sharded ones.
_DEFAULTS: dict[str, dict[str, Any]] = {"adamw": {"fused": True}}

#: the kinds of groups, by which a checkpoint knows them
MATRICES, VECTORS = "group-0", "group-1"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors (norms, biases), which do not; a group more for each mesh of ranks that they
    lie over, for a fused pass takes tensors of one. The layout decides how many groups there are: what belongs to a
    parameter is known by its name, and what belongs to a group by its ``kind``.
    """
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            # The biases of a layer's experts lie in one tensor, a row each.
            decays = parameter.ndim >= 2 and not name.endswith("bias")
            groups.setdefault((decays, mesh), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: not group[0][0])  # matrices first, else as they come
    return [
        {"params": own, "weight_decay": weight_decay if decays else 0.0, "kind": MATRICES if decays else VECTORS}
        for (decays, _), own in ordered
    ]


def named_optimizer(config: OptimizerConfig) -> Any:
    """The class that a config names, which takes the config's options; nothing is made.

    Raises:
        ConfigError: no such optimiser, or options that it does not take.
    """
    named = resolve(config.name, OPTIMIZERS, what="optimiser", where="train.optimizer.name")
    where = "train.optimizer.options"
    check_options(named, config.options, what="optimiser", where=where, leading=1, given=("lr",))
    return named


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of a run: one of :data:`OPTIMIZERS`, or ``module:Class`` of an installed library.

    It gets the parameter groups, ``lr``, ``options``, and of betas and eps those that its signature names: plain SGD
    has neither. ``options`` come last and may replace any of them.

    Raises:
        ConfigError: no such optimiser, or options or values that it does not take.
    """
    factory = named_optimizer(config)
    taken = inspect.signature(factory).parameters
    common = {name: getattr(config, name) for name in ("betas", "eps") if name in taken}
    settings = {"lr": config.lr, **common, **_DEFAULTS.get(config.name, {}), **config.options}
    try:
        built: torch.optim.Optimizer = factory(parameter_groups(model, config.weight_decay), **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "the optimiser cannot be made with these values",
            where="train.optimizer",
            got=settings,
            expected=f"what {config.name} accepts",
            fix=str(error),
        ) from error
    return built
