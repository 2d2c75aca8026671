"""The ranks of a job as a mesh: who shares what with whom, made once per job.

Axes, the last one fastest: replicate, shard, context, tensor (:class:`~posttrain_lib.schema.mesh.MeshSpec`). FSDP2 lays
a copy's weights over shard and context together, for both need whole weights for other tokens. Experts take the same
ranks in another division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from posttrain_lib.errors import ConfigError
from posttrain_lib.parallel.process_group import global_sum, world_size
from posttrain_lib.schema.mesh import MeshSpec


@dataclass(frozen=True, eq=False)
class RankMesh:
    """The mesh as one rank sees it; made by :func:`rank_mesh`.

    Each property that gives a ``DeviceMesh`` is for a job of several ranks. Every collective over one of them has to be
    called by all of its ranks.
    """

    spec: MeshSpec
    device: torch.device
    rank: int = 0
    _weights: DeviceMesh | None = None  # replicate, fsdp, tensor
    _rows: DeviceMesh | None = None  # replicate, shard, context, tensor; None where no context ranks are
    _experts: DeviceMesh | None = None  # replicate, expert_fsdp, expert, tensor; None where experts are not dealt out

    @property
    def fsdp(self) -> DeviceMesh:
        """The ranks that FSDP2 lays weights over: [shard x context], or [replicate, shard x context]."""
        return _with_replicas(self._weights, "fsdp")

    @property
    def tensor(self) -> DeviceMesh:
        """[tensor]: this rank and those that compute the same tokens with it."""
        return _axis(self._weights, "tensor")

    @property
    def context(self) -> DeviceMesh:
        """[context]: this rank and those that have the other tokens of its rows, in the order of their rank."""
        return _axis(self._rows, "context")

    @property
    def expert(self) -> DeviceMesh:
        """[expert]: this rank and those that have the other experts; neighbours among shard x context."""
        return _axis(self._experts, "expert")

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """What FSDP2 lays a rank's own experts over: [shard x context / expert], with replicate in front as above."""
        return _with_replicas(self._experts, "expert_fsdp")

    @property
    def data_rank(self) -> int:
        """Which rows this rank gets, of :attr:`MeshSpec.data_degree`."""
        return self.spec.data_rank(self.rank)

    @property
    def context_rank(self) -> int:
        """Which of its rows' tokens this rank gets."""
        return self.rank // self.spec.tensor % self.spec.context

    @property
    def tensor_rank(self) -> int:
        """Which of the heads, features and vocabulary this rank has."""
        return self.rank % self.spec.tensor

    def sum_over_rows(self, values: Sequence[float]) -> list[float]:
        """Each value summed in float64 over ranks with other *rows*: figures of a rank's rows before they are cut over
        context ranks. The same bits on every rank; all ranks call it."""
        return self._sum(values, self.context_rank == 0 and self.tensor_rank == 0)

    def sum_over_tokens(self, values: Sequence[float]) -> list[float]:
        """The same over ranks with other *tokens*: figures of what a rank has computed. Tensor ranks count once."""
        return self._sum(values, self.tensor_rank == 0)

    def _sum(self, values: Sequence[float], counts: bool) -> list[float]:
        # Over all ranks, the others giving nothing, so that no two of them can go on with different bits.
        return global_sum(values if counts else [0.0] * len(values))


def rank_mesh(spec: MeshSpec, device: torch.device) -> RankMesh:
    """This rank's mesh; a collective inside the process group.

    Raises:
        ConfigError: the group has not as many ranks as the mesh.
    """
    world = world_size()
    if spec.world != world:
        raise ConfigError(
            "the mesh does not fit the ranks that there are",
            where="compute.mesh",
            got=" x ".join(f"{name} {degree}" for name, degree in vars(spec).items() if name != "expert")
            + f" = {spec.world}",
            expected=f"{world} ranks",
            fix="change compute.mesh, or nodes and devices_per_node",
        )
    if world == 1:
        return RankMesh(spec, device)
    ranks, kind = spec.shard * spec.context, device.type
    weights = init_device_mesh(
        kind, (spec.replicate, ranks, spec.tensor), mesh_dim_names=("replicate", "fsdp", "tensor")
    )
    rows = experts = None
    if spec.context > 1:
        degrees = (spec.replicate, spec.shard, spec.context, spec.tensor)
        rows = init_device_mesh(kind, degrees, mesh_dim_names=("replicate", "shard", "context", "tensor"))
    if spec.expert > 1:
        degrees = (spec.replicate, ranks // spec.expert, spec.expert, spec.tensor)
        experts = init_device_mesh(kind, degrees, mesh_dim_names=("replicate", "expert_fsdp", "expert", "tensor"))
    return RankMesh(spec, device, dist.get_rank(), weights, rows, experts)


def _axis(mesh: DeviceMesh | None, name: str) -> DeviceMesh:
    assert mesh is not None, f"this job has no {name} ranks"
    return mesh[name]


def _with_replicas(mesh: DeviceMesh | None, name: str) -> DeviceMesh:
    assert mesh is not None, f"this job has no {name} ranks"
    return mesh[name] if mesh["replicate"].size() == 1 else mesh["replicate", name]
