"""Who shares what with whom, by rank number; the collectives themselves are tested with processes."""

from __future__ import annotations

import pytest
import torch

from posttrain_lib.errors import ConfigError
from posttrain_lib.parallel.mesh import RankMesh, rank_mesh
from posttrain_lib.schema.mesh import MeshSpec

CPU = torch.device("cpu")


def test_tensor_ranks_are_neighbours_then_context_then_rows() -> None:
    spec = MeshSpec(replicate=2, shard=2, context=2, tensor=2)
    places = [RankMesh(spec, CPU, rank) for rank in range(spec.world)]
    assert [place.tensor_rank for place in places] == [0, 1] * 8
    assert [place.context_rank for place in places] == [0, 0, 1, 1] * 4
    assert [place.data_rank for place in places] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_one_rank_needs_no_group_and_sums_to_itself() -> None:
    mesh = rank_mesh(MeshSpec(), CPU)
    assert mesh.sum_over_rows([1.5, 2.0]) == mesh.sum_over_tokens([1.5, 2.0]) == [1.5, 2.0]


def test_a_mesh_of_other_size_than_the_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit the ranks") as caught:
        rank_mesh(MeshSpec(shard=2, tensor=2), CPU)
    assert "replicate 1 x shard 2 x context 1 x tensor 2 = 4" in str(caught.value)
    assert "1 ranks" in str(caught.value)
