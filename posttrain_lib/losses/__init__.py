"""Losses by name: plain mathematics on per-token signals. None brings a trainer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.errors import ConfigError
from posttrain_lib.losses.base import Loss
from posttrain_lib.registry import resolve

LOSSES: dict[str, str] = {
    "sft": "posttrain_lib.losses.sft:SFTLoss",
    "distill": "posttrain_lib.losses.distill:DistillLoss",
    "sigmoid": "posttrain_lib.losses.sigmoid:SigmoidLoss",
    "dpo": "posttrain_lib.losses.dpo:DPOLoss",
    "simpo": "posttrain_lib.losses.reference_free:SimPOLoss",
    "orpo": "posttrain_lib.losses.reference_free:ORPOLoss",
    "kto": "posttrain_lib.losses.kto:KTOLoss",
    "reward": "posttrain_lib.losses.reward:RewardLoss",
    "policy": "posttrain_lib.losses.policy:PolicyLoss",
}


def build_loss(name: str, options: Mapping[str, Any] | None = None) -> Loss:
    """The loss called ``name``, or a user's own given as ``module:attribute``, made with ``options``.

    Raises:
        ConfigError: no such loss, or options that it does not take.
    """
    factory = resolve(name, LOSSES, what="loss", where="train.loss")
    try:
        loss: Loss = factory(**(options or {}))
    except TypeError as error:
        raise ConfigError(
            "the loss does not take these options", where="train.loss_options", got=dict(options or {}), fix=str(error)
        ) from error
    return loss
