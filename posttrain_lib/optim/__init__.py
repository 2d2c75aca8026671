"""Optimisers by name, learning-rate schedules, gradient clipping."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain_lib.errors import ConfigError
from posttrain_lib.registry import resolve

if TYPE_CHECKING:
    from posttrain_lib.config.train import Optimizer as OptimizerConfig

OPTIMIZERS: dict[str, str] = {
    "adamw": "torch.optim:AdamW",
    "sgd": "torch.optim:SGD",
}
#: Arguments beyond the config's: one pass over all parameters. SGD's fused pass cannot take sharded ones.
_DEFAULTS: dict[str, dict[str, Any]] = {"adamw": {"fused": True}}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors (norms, biases), which do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of a run: one of :data:`OPTIMIZERS`, or ``module:Class`` of an installed library.

    It gets the parameter groups, ``lr``, ``options``, and of betas and eps those that its signature names: plain SGD
    has neither. ``options`` come last and may replace any of them.

    Raises:
        ConfigError: no such optimiser, or options that it does not take.
    """
    factory = resolve(config.name, OPTIMIZERS, what="optimiser", where="train.optimizer.name")
    taken = inspect.signature(factory).parameters
    common = {name: getattr(config, name) for name in ("betas", "eps") if name in taken}
    settings = {"lr": config.lr, **common, **_DEFAULTS.get(config.name, {}), **config.options}
    try:
        built: torch.optim.Optimizer = factory(parameter_groups(model, config.weight_decay), **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "the optimiser does not take these options",
            where="train.optimizer.options",
            got=dict(config.options),
            expected="arguments of " + config.name + ": " + ", ".join(name for name in taken if name != "params"),
            fix=str(error),
        ) from error
    return built
