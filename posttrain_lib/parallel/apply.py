"""One function, one order: compiled blocks, then recomputation around each, then sharding of each and of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from posttrain_lib.parallel.compilation import Compilation, compile_blocks
from posttrain_lib.parallel.recomputation import Recomputation, recompute_blocks

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.schema.mesh import MeshSpec


def apply_parallelism(
    model: Decoder,
    *,
    mesh: MeshSpec,
    device: torch.device,
    activation_checkpointing: Recomputation,
    compilation: Compilation = "none",
) -> Decoder:
    """Lay the model over the ranks of ``mesh`` in place (FSDP2), its blocks compiled and recomputing if asked.

    1. Compilation and recomputation replace each block's ``forward``; no wrapper module appears, so weight names stay.
       Recomputation stands around the compiled code.
    2. Each block is a sharding unit: one all-gather for its forward, one for its backward.
    3. The root takes what is left (embedding, last norm, head). The loss runs inside the root's forward, where
       those weights are whole.

    Weights stay float32 and autocast picks the precision of the products, so that one rank and many compute the same;
    FSDP2's own mixed precision would round norms and embeddings as well.
    """
    if compilation == "blocks":
        compile_blocks(model)
    recompute_blocks(model, activation_checkpointing)
    if mesh.world > 1:
        ranks = init_device_mesh(device.type, (mesh.world,), mesh_dim_names=("dp_shard",))
        for layer in model.layers:
            fully_shard(layer, mesh=ranks)
        fully_shard(model, mesh=ranks)
    return model


def gradient_scale(model: nn.Module, divisor: float, world: int) -> float:
    """Factor on a rank's loss sum that makes the reduced gradient that of ``global sum / divisor``.

    FSDP2 averages gradients over ranks: the factor ``world`` makes the average the sum that is meant. (Its
    ``set_gradient_divide_factor(1)`` would ask for a pre-multiplied sum, which gloo does not have.) A step without
    any trained token has divisor 0 and gradient 0.
    """
    if divisor == 0.0:
        return 0.0
    return (world if isinstance(model, FSDPModule) else 1) / divisor


def synchronise_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward communicates: off for all micro-batches of a step but the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
