"""Losses by name: plain mathematics on per-token signals. None brings a trainer of its own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from posttrain_lib.errors import ConfigError
from posttrain_lib.losses.base import Loss

LOSSES: dict[str, str] = {
    "sft": "posttrain_lib.losses.sft:SFTLoss",
}


def build_loss(name: str, options: Mapping[str, Any] | None = None) -> Loss:
    """The loss called ``name``, or a user's own given as ``module:attribute``, made with ``options``.

    Raises:
        ConfigError: no such loss, or options that it does not take.
    """
    target = LOSSES.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise ConfigError(
            "unknown loss", where="train.loss", got=name, expected=f"one of {sorted(LOSSES)}, or module:attribute"
        )
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError("the loss cannot be imported", where="train.loss", got=name, fix=str(error)) from error
    try:
        loss: Loss = factory(**(options or {}))
    except TypeError as error:
        raise ConfigError("the loss does not take these options", where="train.loss_options", got=options, fix=str(error)) from error
    return loss
