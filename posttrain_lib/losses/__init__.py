"""Losses by name: plain mathematics on per-token signals. None brings a trainer of its own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain_lib.errors import ConfigError, PosttrainError
from posttrain_lib.losses.base import Loss
from posttrain_lib.registry import resolve

if TYPE_CHECKING:
    from posttrain_lib.config.train import TrainConfig

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
    _check_names(name, factory, options or {})
    try:
        loss: object = factory(**(options or {}))
    except PosttrainError:
        raise
    except Exception as error:  # whatever a user's own constructor raises: the field is named, the cause is kept
        raise ConfigError(
            f"the loss {name} cannot be made with these options",
            where="train.loss_options",
            got=dict(options or {}),
            fix=f"it raised {type(error).__name__}: {error}",
        ) from error
    if not isinstance(loss, Loss):
        raise ConfigError(
            f"{name} is no loss",
            where="train.loss",
            got=type(loss).__name__,
            expected="a class derived from posttrain_lib.losses.base.Loss, or a function that makes one",
        )
    return loss


def loss_of(train: TrainConfig) -> Loss:
    """The loss of a train section: what it names, or plain ``sft``; raises as :func:`build_loss`."""
    return build_loss(train.loss or "sft", train.loss_options)


def _check_names(name: str, factory: Any, options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return  # not told, as of what is written in C: the call itself will say
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if unknown := sorted(set(options) - set(parameters)):
        near = difflib.get_close_matches(unknown[0], parameters, n=1)
        raise ConfigError(
            f"the loss {name} has no option {unknown[0]!r}",
            where=f"train.loss_options.{unknown[0]}",
            got=dict(options),
            expected=", ".join(parameters) or "no options",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )
