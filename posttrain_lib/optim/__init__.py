"""Optimisers by name, learning-rate schedules, gradient clipping."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain_lib.errors import ConfigError

if TYPE_CHECKING:
    from posttrain_lib.config.train import Optimizer as OptimizerConfig

#: name -> (class, which of the common settings it takes)
OPTIMIZERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adamw": ("torch.optim:AdamW", ("betas", "eps")),
    "sgd": ("torch.optim:SGD", ()),
}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors (norms, biases), which do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of a run: one of :data:`OPTIMIZERS`, or ``module:Class`` of an installed library.

    A named class gets the parameter groups, ``lr`` and ``options``; betas and eps only where it is known to take them.

    Raises:
        ConfigError: no such optimiser, or options that it does not take.
    """
    target, common = OPTIMIZERS.get(config.name, (config.name, ()))
    module, colon, attribute = target.partition(":")
    if not colon:
        raise ConfigError(
            "unknown optimiser",
            where="train.optimizer.name",
            got=config.name,
            expected=f"one of {sorted(OPTIMIZERS)}, or module:Class",
        )
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(
            "the optimiser cannot be imported", where="train.optimizer.name", got=config.name, fix=str(error)
        ) from error
    settings = {name: getattr(config, name) for name in common}
    try:
        built: torch.optim.Optimizer = factory(
            parameter_groups(model, config.weight_decay), lr=config.lr, **settings, **config.options
        )
    except TypeError as error:
        raise ConfigError(
            "the optimiser does not take these options", where="train.optimizer", got=config.options, fix=str(error)
        ) from error
    return built
