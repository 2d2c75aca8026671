"""Degrees of the mesh's axes."""

from __future__ import annotations

import pytest

from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.schema.mesh import MeshSpec


def test_ranks_of_one_data_group_stand_together() -> None:
    mesh = MeshSpec(replicate=2, shard=3, context=2, tensor=2)
    assert (mesh.world, mesh.data_degree) == (24, 6)
    assert [mesh.data_rank(rank) for rank in range(24)] == [group for group in range(6) for _ in range(4)]


@pytest.mark.parametrize(("degrees", "says"), [({"tensor": 0}, "tensor"), ({"shard": 2, "expert": 3}, "divide")])
def test_impossible_degrees_are_refused(degrees: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MeshSpec(**degrees)


def test_sharding_takes_what_the_other_axes_leave() -> None:
    compute = ComputeConfig.model_validate({"nodes": 64, "devices_per_node": 8, "mesh": {"replicate": 4, "tensor": 8}})
    assert compute.mesh_spec() == MeshSpec(replicate=4, shard=16, tensor=8)


def test_a_mesh_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 3 devices .*gives 4"):
        ComputeConfig.model_validate({"devices_per_node": 4, "mesh": {"tensor": 3}})
