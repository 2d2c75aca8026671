"""Adapters over two processes (FSDP) against one: the same training, files and merged weights."""

from __future__ import annotations

import multiprocessing
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from posttrain_lib.checkpoint.adapters import adapters_trajectory, save_adapter
from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.errors import ModelError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import LoraSettings, apply_lora, init_adapters, merged_state_dict
from posttrain_lib.optim import parameter_groups
from posttrain_lib.parallel.apply import apply_parallelism, gradient_scale
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.mesh import MeshSpec
from tests.support.lora_cases import everything_of
from tests.support.tiny_models import write_tiny_model

RANKS, STEPS = 2, 4
#: case -> its model's changes, dtype of the base, adapters ("" = on everything)
RUNS: dict[str, tuple[str, torch.dtype, LoraSettings | None]] = {
    "everything": ("qwen3", torch.float32, None),
    "tied": ("llama, tied", torch.float32, None),
    "experts": ("mixtral", torch.float32, None),
    "low precision": ("phi3", torch.bfloat16, None),
    "dora": ("llama", torch.float32, LoraSettings(3, 6.0, dora=True, rslora=True)),
}


def train(folder: Path, run: str, rank: int, world: int) -> dict[str, Any]:
    """A few steps on two documents, one for each of two ranks; adapters, merged weights and losses."""
    case, dtype, settings = RUNS[run]
    source, cpu = folder / case, torch.device("cpu")
    spec = spec_from_folder(source)
    model = build_model(spec, dtype, device="meta" if world > 1 else "cpu")
    settings = settings or everything_of(model)
    model = apply_lora(model, settings)
    modes = {"everything": "full", "experts": "selective"}
    mesh = rank_mesh(MeshSpec(shard=world), cpu)
    apply_parallelism(model, mesh=mesh, activation_checkpointing=modes.get(run, "none"))
    if world > 1:
        model.to_empty(device="cpu")
    load_hf_weights(model, spec, source)
    init_adapters(model, settings.seed)
    base = {name: local(value) for name, value in model.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for document in range(RANKS)[rank::world]:
            token_ids = (torch.arange(12) * (document + 3) + step) % 90 + 3
            cu_seqlens = torch.tensor([0, 12], dtype=torch.int32)
            logits = model(token_ids, torch.arange(12), cu_seqlens, 12)
            total = total + torch.nn.functional.cross_entropy(logits[:-1].float(), token_ids[1:], reduction="sum")
        (total * gradient_scale(22)).backward()
        assert all(value.grad is None for value in model.parameters() if not value.requires_grad)
        losses.append(total.detach())
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(torch.equal(local(after[name]), value) for name, value in base.items())
    save_adapter(model, spec, folder / f"{run}-{world}")
    adapters = {name: whole(value) for name, value in after.items() if value.requires_grad}
    merged, trajectory = merged_state_dict(model), adapters_trajectory(model)
    return {"adapters": adapters, "merged": merged, "losses": losses, "trajectory": trajectory}


def local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def on_rank(rank: int, folder: Path) -> None:
    """What a process of the group does; its results, or how it failed, are saved in the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        result: Any = {run: train(folder, run, rank, RANKS) for run in RUNS}
        sharded = build_model(spec_from_folder(folder / "qwen3"))
        mesh = rank_mesh(MeshSpec(shard=RANKS), torch.device("cpu"))
        apply_parallelism(sharded, mesh=mesh, activation_checkpointing="none")
        with pytest.raises(ModelError, match="cannot be added to a sharded model"):
            apply_lora(sharded, LoraSettings(2, 4.0))
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    for case, _, _ in RUNS.values():
        write_tiny_model(case, folder / case)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=on_rank, args=(rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    alone = {run: train(folder, run, 0, 1) for run in RUNS}
    for process in processes:
        process.join(timeout=300)
        assert not process.is_alive()
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]
    for result in ranks:
        assert isinstance(result, dict), result
    return folder, ranks, alone


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_as_one(both: tuple[Path, list[dict[str, Any]], dict[str, Any]], run: str) -> None:
    from safetensors.torch import load_file

    folder, ranks, alone = both
    low = RUNS[run][1] == torch.bfloat16
    # Sums of two documents in another order; Adam divides by small moments. In bfloat16 the base's rounding of
    # activations (2^-8) is in both alike, for each document is computed on one rank either way.
    assert_near = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    first, second = (result[run] for result in ranks)
    assert sum(first["losses"]) + sum(second["losses"]) == pytest.approx(float(sum(alone[run]["losses"])), rel=1e-4)
    moved = 0.0
    for name, value in alone[run]["adapters"].items():
        assert value.dtype == torch.float32
        assert_near(first["adapters"][name], value)
        assert torch.equal(first["adapters"][name], second["adapters"][name])
        moved = max(moved, float(value.abs().max()))
    assert moved > 0.01
    assert first["trajectory"] == second["trajectory"] == alone[run]["trajectory"]
    assert list(first["merged"]) == list(alone[run]["merged"])
    for name, value in alone[run]["merged"].items():
        assert first["merged"][name].dtype == value.dtype == (torch.bfloat16 if low else torch.float32)
        # one step of bfloat16 where a sum falls beside it
        rounded = partial(torch.testing.assert_close, rtol=2**-7, atol=1e-3) if low else assert_near
        rounded(first["merged"][name], value)
    one, two = (load_file(folder / f"{run}-{world}" / "adapter_model.safetensors") for world in (1, 2))
    assert list(one) == list(two)
    for name, value in one.items():
        assert_near(two[name], value)
