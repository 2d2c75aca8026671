"""One function, one order, in which a model is laid over the ranks of a mesh. Nothing in its forward knows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from posttrain_lib.parallel.compilation import Compilation, compile_blocks
from posttrain_lib.parallel.recomputation import Recomputation, recompute_blocks

if TYPE_CHECKING:
    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.parallel.mesh import RankMesh

#: what of a sharded model lies in the host's memory
Offload = Literal["none", "parameters"]


def apply_parallelism(
    model: Decoder,
    *,
    mesh: RankMesh,
    activation_checkpointing: Recomputation,
    compilation: Compilation = "none",
    offload: Offload = "none",
) -> Decoder:
    """Lay the model over the ranks of ``mesh`` in place, before its weights are read.

    1. Tensor parallelism cuts projections and the vocabulary: what is laid over ranks later are the parts.
    2. Experts are dealt out, so that a rank has some of them; what FSDP2 does with those is decided there.
    3. Context parallelism changes nothing: parts of a batch carry what attention needs. It refuses what cannot run on
       parts.
    4. Compilation, then recomputation replace each block's ``forward``; no wrapper module appears, so weight names
       stay. Recomputation stands around the compiled code.
    5. FSDP2: each block is a unit with one all-gather for its forward and one for its backward. The root takes what is
       left (embedding, last norm, head). The loss runs inside the root's forward, where those weights are whole.

    Weights stay float32 and autocast picks the precision of the products, so that one rank and many compute the same;
    FSDP2's own mixed precision would round norms and embeddings as well.

    ``offload`` "parameters": a rank's share of weights, gradients and optimiser state lies in the host's memory, and
    weights come to the device unit by unit. The optimiser then runs on the CPU.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    degrees = mesh.spec
    if degrees.tensor > 1:
        from posttrain_lib.parallel.tensor import apply_tensor_parallel

        apply_tensor_parallel(model, mesh.tensor)
    if degrees.expert > 1:
        from posttrain_lib.parallel.experts import apply_expert_parallel

        apply_expert_parallel(model, mesh)
    if degrees.context > 1:
        from posttrain_lib.parallel.context import apply_context_parallel

        apply_context_parallel(model, mesh)
    if compilation == "blocks":
        compile_blocks(model)
    recompute_blocks(model, activation_checkpointing)
    if degrees.world > degrees.tensor or (offload == "parameters" and degrees.world > 1):
        _shard(model, mesh, offload)
    return model


def _shard(model: Decoder, mesh: RankMesh, offload: Offload) -> None:
    """FSDP2 from the leaves to the root; a rank's own experts lie over fewer ranks than the rest of their block."""
    placement = None
    if mesh.spec.expert > 1:
        from posttrain_lib.parallel.experts import expert_sharding

        placement = expert_sharding(mesh)
    # Pinned memory is for copies to a GPU alone.
    policy = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if offload == "parameters" else OffloadPolicy()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh.fsdp, shard_placement_fn=placement, offload_policy=policy)
    fully_shard(model, mesh=mesh.fsdp, offload_policy=policy)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            # Sums in place of averages, whatever ranks a unit's weights lie over (gloo has no pre-multiplied sum).
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)


def gradient_scale(divisor: float) -> float:
    """Factor on a rank's loss sum that makes the reduced gradient that of ``global sum / divisor``.

    Gradients are summed over ranks with different tokens, so that it is the same for every mesh and every weight. A
    step without any trained token has divisor 0 and gradient 0.
    """
    return 0.0 if divisor == 0.0 else 1.0 / divisor


def settle_gradients(model: nn.Module) -> None:
    """After a step's last backward: what of a gradient is left as shares of a sum over tensor ranks becomes whole.

    FSDP2 has done so for the weights that it lays over ranks; without it there is nobody else. One collective for
    each dtype.
    """
    shares: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            shares.setdefault(gradient.dtype, []).append(parameter)
    for owners in shares.values():
        own = [parameter.grad.to_local() for parameter in owners]  # type: ignore[union-attr]
        total = torch.cat([share.flatten() for share in own])
        first = owners[0]
        assert isinstance(first, DTensor)
        dist.all_reduce(total, group=first.device_mesh.get_group())
        for parameter, part in zip(owners, total.split([share.numel() for share in own]), strict=True):
            assert isinstance(parameter, DTensor)
            whole = part.view(parameter.to_local().shape)
            parameter.grad = DTensor.from_local(whole, parameter.device_mesh, parameter.placements, run_check=False)


def synchronise_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward communicates: off for all micro-batches of a step but the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
