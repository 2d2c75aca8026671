"""The mesh that a job goes on with when devices are gone."""

from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.compute.elastic import smaller_mesh
from posttrain_lib.schema.mesh import MeshSpec


def test_the_axes_that_see_different_rows_shrink_alone() -> None:
    mesh = MeshSpec(replicate=2, shard=4, tensor=2)
    fitting = {"least": 1, "rows_per_step": 8, "micro_batch_rows": 1}
    assert smaller_mesh(mesh, 15, **fitting) == MeshSpec(replicate=2, shard=2, tensor=2) or smaller_mesh(
        mesh, 15, **fitting
    ) == MeshSpec(replicate=1, shard=4, tensor=2)
    assert smaller_mesh(mesh, 15, **fitting) == MeshSpec(replicate=1, shard=4, tensor=2), "weights over more devices"
    assert smaller_mesh(mesh, 3, **fitting) == MeshSpec(tensor=2)
    assert smaller_mesh(mesh, 1, **fitting) is None, "a row's tensors stay over two devices"
    assert smaller_mesh(mesh, 7, least=8, rows_per_step=8, micro_batch_rows=1) is None


def test_every_rank_keeps_equally_many_rows() -> None:
    mesh = MeshSpec(shard=6)
    assert smaller_mesh(mesh, 5, least=1, rows_per_step=12, micro_batch_rows=1) == MeshSpec(shard=4)
    assert smaller_mesh(mesh, 5, least=1, rows_per_step=12, micro_batch_rows=4) == MeshSpec(shard=3)


def test_experts_are_still_dealt_out() -> None:
    mesh = MeshSpec(shard=8, expert=4)
    assert smaller_mesh(mesh, 7, least=1, rows_per_step=24, micro_batch_rows=1) == MeshSpec(shard=4, expert=4)
    assert smaller_mesh(mesh, 3, least=1, rows_per_step=24, micro_batch_rows=1) is None


@given(
    replicate=st.integers(1, 4),
    shard=st.integers(1, 8),
    tensor=st.integers(1, 4),
    devices=st.integers(0, 130),
    least=st.integers(1, 8),
    share=st.integers(1, 24),
    micro=st.integers(1, 3),
)
def test_what_is_found_keeps_every_rule(
    replicate: int, shard: int, tensor: int, devices: int, least: int, share: int, micro: int
) -> None:
    rows = share * micro
    mesh = MeshSpec(replicate=replicate, shard=shard, tensor=tensor)
    found = smaller_mesh(mesh, devices, least=least, rows_per_step=rows, micro_batch_rows=micro)
    if found is None:
        assert not (tensor >= least and devices >= tensor), "one group of rows always computes the same steps"
        return
    assert least <= found.world <= devices
    assert rows % (found.data_degree * micro) == 0
    assert (found.tensor, found.context, found.expert) == (mesh.tensor, mesh.context, mesh.expert)
