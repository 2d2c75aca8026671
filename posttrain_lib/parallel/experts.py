"""Expert parallelism (GShard, Lepikhin et al. 2021): the experts of every mixture are dealt out over ranks, and tokens
go to the owners of their experts and back.

Rank r of n owns the experts from ``r * E / n`` on. Rows of tokens, sorted by expert, lie in the order of the owners
already; one all-to-all of counts tells each rank what it will get, one of rows brings it, one brings the outputs back,
and the backward is the same in the other direction. Nothing is dropped and nothing padded: a rank whose experts get all
rows computes them all, one whose experts get none takes part with none.

An owner puts the rows of an expert in the order of the ranks that sent them, and those of one rank in the order of its
tokens. So sums over an expert's rows (its gradients) are in the order of one process that has the ranks' tokens one
behind the other, and a token's outputs are added up where the token is, in the order of its choices, as without ranks.

The router is whole everywhere. An expert's gradient has the tokens of all ranks of its group when its owner's backward
is done; what remains is the sum over the ranks that own the same experts for other tokens, which is FSDP2's, and for
which those ranks share its weight (:func:`expert_sharding`). That takes gradients which are summed, not averaged.

Recomputation runs a block's all-to-alls again: all ranks have the same blocks and go through them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from posttrain_lib.errors import ConfigError
from posttrain_lib.models.feed_forward import Experts
from posttrain_lib.models.spec import ExpertsConfig
from posttrain_lib.ops.experts import ExpertGroups

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.models.spec import DecoderConfig
    from posttrain_lib.parallel.mesh import RankMesh


def check_experts(config: DecoderConfig, degree: int) -> None:
    """Refuse what cannot be dealt out over ``degree`` ranks; knows no process group, for plans and the start of a run.

    Raises:
        ConfigError: no layer has experts, or one has a number of them that the degree does not divide.
    """
    if degree == 1:
        return
    counts = {
        number: layer.mlp.num_experts
        for number, layer in enumerate(config.layers)
        if isinstance(layer.mlp, ExpertsConfig)
    }
    if not counts:
        raise ConfigError(
            "the model has no experts that could be dealt out over ranks",
            where="compute.mesh.expert",
            got=degree,
            expected=1,
        )
    for number, count in counts.items():
        if count % degree:
            raise ConfigError(
                "the experts cannot be dealt out evenly",
                where=f"compute.mesh.expert, layer {number}",
                got=f"{count} experts over {degree} ranks",
                expected=f"a degree that divides {count}",
            )


def apply_expert_parallel(model: Decoder, mesh: RankMesh) -> None:
    """Leave a rank its share of the experts of every mixture, in place; before the weights are read.

    Their parameters, biases and adapters too, become sharded tensors over ``mesh.expert`` with the shapes of all
    experts, so that loading, checkpoints and export see one model.

    Raises:
        ConfigError: as :func:`check_experts`.
    """
    ranks = mesh.expert
    check_experts(model.config, ranks.size())
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        for name, parameter in list(experts.named_parameters(recurse=False)):
            dealt = distribute_tensor(parameter.detach(), ranks, [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(dealt, requires_grad=parameter.requires_grad))
        experts.exchange = AllToAll(ranks.get_group())


def expert_sharding(mesh: RankMesh) -> Callable[[nn.Parameter], ShardPlacementResult | None]:
    """``fully_shard``'s ``shard_placement_fn``: dealt-out experts lie over the ranks that own the same ones.

    They belong to their block's unit, so that recomputation finds them whole when it runs the block again, and are a
    group of their own in it. Cut are whole experts if these can be shared out evenly, else every expert's features: in
    a large mesh a rank owns few experts, which many ranks share. The function raises as :func:`even_dimension`.
    """
    # torch's own type for this, which has no public name yet and is younger than 2.11: who deals no experts out does
    # without it
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo

    ranks = mesh.expert_fsdp
    info = FSDPMeshInfo(ranks, 0) if ranks.ndim == 1 else HSDPMeshInfo(ranks, 1, 0)
    return partial(_sharding, mesh.expert, info)


def _sharding(dealt: DeviceMesh, info: FSDPMeshInfo, parameter: nn.Parameter) -> ShardPlacementResult | None:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

    if not isinstance(parameter, DTensor) or parameter.device_mesh != dealt:
        return None
    return ShardPlacementResult(Shard(even_dimension(parameter.to_local().shape, info.shard_mesh_size)), info)


def even_dimension(sizes: Sequence[int], ranks: int) -> int:
    """The first dimension of a rank's own experts that so many ranks can cut into equal parts.

    Raises:
        ConfigError: there is none. Unequal parts of experts that are dealt out already lie in no plain order.
    """
    for dim, size in enumerate(sizes):
        if size % ranks == 0:
            return dim
    raise ConfigError(
        "an expert weight cannot be cut evenly over the ranks that share it",
        where="compute.mesh",
        got=f"{' x '.join(map(str, sizes))} over shard x context / expert = {ranks} ranks",
        expected="a number of ranks that divides one of these",
        fix="raise compute.mesh.expert, or change shard or the rank of the adapters",
    )


@dataclass(frozen=True)
class AllToAll:
    """The :class:`~posttrain_lib.ops.experts.Exchange` over a group whose ranks own equal shares of the experts."""

    group: dist.ProcessGroup

    def to_owners(
        self, rows_PD: Tensor, groups: ExpertGroups
    ) -> tuple[Tensor, ExpertGroups, Callable[[Tensor], Tensor]]:
        """See the protocol; all ranks of the group call it. The host waits for the counts once."""
        sent_E = groups.counts_E
        received_E = torch.empty_like(sent_E)  # by rank that sends, of each the counts of this rank's experts
        dist.all_to_all_single(received_E, sent_E, group=self.group)
        by_rank = torch.stack((sent_E, received_E)).unflatten(1, (self.group.size(), -1))
        sent, received = by_rank.sum(2).tolist()
        arrived = _Moved.apply(rows_PD, sent, received, self.group)
        experts = by_rank.shape[2]
        ids_E = torch.arange(experts, device=sent_E.device).repeat(self.group.size())
        ids_Q = ids_E.repeat_interleave(received_E, output_size=sum(received))
        own = ExpertGroups.of(ids_Q[:, None], experts)

        def back(outputs_QO: Tensor) -> Tensor:
            in_order = _Reordered.apply(outputs_QO, own.place_P, own.order_P)
            return _Moved.apply(in_order, received, sent, self.group)

        return _Reordered.apply(arrived, own.order_P, own.place_P), own, back


class _Moved(torch.autograd.Function):
    """An all-to-all of rows: the first ``sent[0]`` to rank 0 and so on; those of rank 0 come first."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _move(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _move(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _move(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    output = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output


class _Reordered(torch.autograd.Function):
    """Rows by an index that has each place once; backward by the inverse, a gather again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.inverse), None, None
