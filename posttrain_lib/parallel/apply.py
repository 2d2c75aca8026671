"""One function, one order: recomputation inside each block first, then sharding of each block, then of the rest."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder


def apply_parallelism(model: Decoder, *, world: int, device: torch.device, activation_checkpointing: bool) -> Decoder:
    """Lay the model over ``world`` ranks in place (FSDP2), with activation recomputation per block if asked.

    1. Recomputation replaces each block's ``forward``; no wrapper module appears, so weight names stay.
    2. Each block is a sharding unit: one all-gather for its forward, one for its backward.
    3. The root takes what is left (embedding, last norm, head). The loss runs inside the root's forward, where
       those weights are whole.
    """
    if activation_checkpointing:
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
    if world > 1:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("dp_shard",))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def synchronise_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward communicates: off for all micro-batches of a step but the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
