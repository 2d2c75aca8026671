"""A checkpoint of any layout read by any other, bit for bit: weights and optimiser, on 1 to 4 ranks in 1-D and 2-D."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from posttrain_lib.checkpoint.manager import CheckpointManager, load_model_state
from posttrain_lib.errors import CheckpointError
from posttrain_lib.lineage.digests import digest_file
from posttrain_lib.training.state import Progress, TrainState
from tests.support.rank_pool import RankPool

#: layout -> ranks
LAYOUTS = {"single": 1, "fsdp2": 2, "tensor2": 2, "fsdp4": 4, "hsdp": 4, "fsdp_tensor": 4, "expert": 4, "submesh": 4}

Saved = dict[str, Tensor]


class Position:
    """The loader's part: nothing."""

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        assert state == {}


class Model(nn.Module):
    """Matrices that the degrees divide and one that they do not, experts, a vector, a scalar; one above the size from
    which copies are shared out among their holders."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        shapes = {"even": (8, 12), "odd": (7, 5), "experts": (4, 6, 2), "vector": (9,), "large": (516, 640)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=random)))
        self.scalar = nn.Parameter(torch.randn((), generator=random))
        self.rounded = nn.Parameter(torch.randn((6, 4), generator=random).bfloat16())


def laid_out(layout: str, seed: int) -> nn.Module:
    """The model over this process group's ranks."""
    model = Model(seed)
    if layout == "single":
        return model
    if layout in ("fsdp2", "fsdp4"):
        whole = {"scalar", "rounded"}  # FSDP2 takes no scalars, and one dtype for a group
        ignored = {parameter for name, parameter in model.named_parameters() if name in whole}
        return fully_shard(model, mesh=init_device_mesh("cpu", (LAYOUTS[layout],)), ignored_params=ignored)
    cut: dict[str, list[Placement]]
    if layout == "tensor2":
        mesh = init_device_mesh("cpu", (2,))
        cut = {
            "even": [Shard(1)],
            "odd": [Shard(1)],
            "experts": [Shard(2)],
            "vector": [Replicate()],
            "large": [Shard(1)],
        }
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        cut = {name: [Replicate(), Shard(0)] for name in ("even", "odd", "experts", "vector", "large", "rounded")}
    elif layout == "fsdp_tensor":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        cut_twice(model, mesh)
        return model
    elif layout == "expert":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "expert"))
        cut = {"experts": [Shard(1), Shard(0)], "even": [Shard(0), Shard(0)], "large": [Replicate(), Replicate()]}
    else:  # each half of the ranks has the whole, cut over it
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))["shard"]
        cut = {name: [Shard(0)] for name in ("even", "odd", "large")}
    for name, placements in cut.items():
        place(model, name, mesh, placements)
    return model


def place(model: Model, name: str, mesh: DeviceMesh, placements: list[Placement]) -> None:
    setattr(model, name, nn.Parameter(distribute_tensor(getattr(model, name).detach(), mesh, placements)))


def cut_twice(model: Model, mesh: DeviceMesh) -> None:
    """Tensor parallelism first, FSDP2 over it: dim 0 is cut by both, the inner cut strided."""
    for name, placement in {"even": Shard(0), "large": Shard(0), "experts": Shard(1), "odd": Shard(1)}.items():
        place(model, name, mesh["tp"], [placement])
    ignored = {parameter for name, parameter in model.named_parameters() if name in {"vector", "scalar", "rounded"}}
    fully_shard(model, mesh=mesh["dp"], ignored_params=ignored)


def make_state(layout: str, seed: int, steps: int) -> TrainState:
    model = laid_out(layout, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    return TrainState(model, optimizer, Position(), {"seed": 0}, Progress(step=1), {"step": 1})  # type: ignore[arg-type]


def whole_tensors(state: TrainState) -> Saved:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in state.tensors().items()
    }


def save(rank: int, folder: Path, layout: str) -> Saved:
    """Save a state in the background; what it was."""
    state = make_state(layout, seed=1, steps=2)
    manager = CheckpointManager(folder, 2, rank, asynchronous=True, layout={"of": len(layout)})
    manager.save(state)
    manager.before_update()
    manager.wait()
    return whole_tensors(state)


def load(rank: int, folder: Path, layout: str) -> Saved | None:
    """Resume another state, whose optimiser has taken no step; what it is then."""
    state = make_state(layout, seed=2, steps=0)
    found = CheckpointManager(folder, 2, rank, layout={"of": len(layout)}).resume(state)
    return None if found is None else whole_tensors(state)


def assert_same(one: Saved, other: Saved) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name].dtype == value.dtype, name
        assert torch.equal(other[name], value), name


@pytest.mark.parametrize("writer", LAYOUTS)
def test_any_layout_reads_any_other(rank_pool: RankPool, tmp_path: Path, writer: str) -> None:
    expected = rank_pool.run(LAYOUTS[writer], save, tmp_path, writer)[0]
    assert any(name.endswith("exp_avg_sq") for name in expected)
    for reader in LAYOUTS:
        for found in rank_pool.run(LAYOUTS[reader], load, tmp_path, reader):
            assert found is not None
            assert_same(expected, found)
    weights = load_model_state(tmp_path / "step-00000001")
    assert_same({name.removeprefix("model."): v for name, v in expected.items() if name.startswith("model.")}, weights)


def test_copies_are_written_once_and_shared_out(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(LAYOUTS["hsdp"], save, tmp_path, "hsdp")
    sizes = [(tmp_path / f"step-00000001/tensors-{rank}.bin").stat().st_size for rank in range(4)]
    whole = sum(parameter.numel() * parameter.element_size() for parameter in Model(0).parameters()) * 3
    assert whole <= sum(sizes) < 1.01 * whole, "alignment and the steps' counters come on top"
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.parametrize("victim", [0, 3])
def test_damage_that_one_rank_reads_is_known_to_all(rank_pool: RankPool, tmp_path: Path, victim: int) -> None:
    """The older one is used, on every rank; where there is none, none is."""
    rank_pool.run(LAYOUTS["fsdp4"], save, tmp_path, "fsdp4")
    older, newer = tmp_path / "step-00000001", tmp_path / "step-00000002"
    newer.mkdir()
    for file in older.iterdir():
        (newer / file.name).write_bytes(file.read_bytes())
    image = newer / f"tensors-{victim}.bin"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    assert all(found is not None for found in rank_pool.run(LAYOUTS["fsdp2"], load, tmp_path, "fsdp2"))
    for file in older.iterdir():
        file.unlink()
    older.rmdir()
    assert rank_pool.run(LAYOUTS["fsdp4"], load, tmp_path, "fsdp4") == [None] * 4


def test_another_shape_is_refused_on_every_rank(rank_pool: RankPool, tmp_path: Path) -> None:
    rank_pool.run(LAYOUTS["single"], save, tmp_path, "single")
    index = tmp_path / "step-00000001/tensors-0.json"
    content = json.loads(index.read_text())
    for entry in content["tensors"]:
        entry["name"] = entry["name"].replace("odd", "other")
    manifest = tmp_path / "step-00000001/manifest.json"
    listed = json.loads(manifest.read_text())
    index.write_text(json.dumps(content))
    listed["files"]["tensors-0.json"] = [index.stat().st_size, digest_file(index)]
    manifest.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        rank_pool.run(LAYOUTS["fsdp2"], load, tmp_path, "fsdp2")
