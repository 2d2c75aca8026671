"""A score head over two processes is that of one: FSDP2, where its one row lies on one rank, and tensor parallelism,
where it is whole on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.checkpoint.verify_sharded import TwoProcesses, check_sharded
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import LoraSettings, apply_lora, init_adapters, whole
from posttrain_lib.models.score import SCORE, init_score_head, with_score_head
from posttrain_lib.optim import parameter_groups
from posttrain_lib.optim.clipping import clip_gradients, gradient_norm
from posttrain_lib.parallel.apply import apply_parallelism, settle_gradients
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.mesh import MeshSpec
from tests.support.rank_pool import RankPool
from tests.support.tiny_models import write_tiny_score_model

LORA = LoraSettings(rank=2, alpha=4.0, targets=("attention", "mlp"), seed=3)


@pytest.fixture(scope="module")
def processes() -> Iterator[TwoProcesses]:
    with TwoProcesses() as two:
        yield two


@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3_moe"])
def test_two_ranks_are_one(case: str, processes: TwoProcesses, tmp_path: Path) -> None:
    folder = write_tiny_score_model(case, tmp_path / "model")
    checks = check_sharded(spec_from_folder(folder), folder=folder, processes=processes)
    assert [check.name for check in checks] == ["sharded = single, fsdp", "sharded = single, tensor parallel"]
    for check in checks:
        assert isinstance(check.value, float) and check.passed, check


def train(rank: int, folder: Path, mesh_spec: MeshSpec, lora: LoraSettings | None) -> dict[str, Any]:
    """A head begun over the ranks, then steps on two documents, of which data ranks have one each."""
    mesh = rank_mesh(mesh_spec, torch.device("cpu"))
    spec = with_score_head(spec_from_folder(folder))
    model = build_model(spec, torch.float64, device="meta")
    if lora is not None:
        model = apply_lora(model, lora)
    apply_parallelism(model, mesh=mesh, activation_checkpointing="none")
    model.to_empty(device="cpu")
    load_hf_weights(model, spec, folder)
    init_score_head(model, spec, seed=5)
    if lora is not None:
        init_adapters(model, lora.seed)
    begun = whole(model.score.weight.detach()).clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    scores, norms = [], []
    for step in range(3):
        for document in range(2)[mesh.data_rank :: mesh_spec.data_degree]:
            token_ids = (torch.arange(12) * (document + 3) + step) % 90 + 3
            cu_seqlens = torch.tensor([0, 12], dtype=torch.int32)
            score = model(token_ids, torch.arange(12), cu_seqlens, 12, lambda hidden, head: head.logits(hidden[-1:]))
            (score.sum() * (1 - 2 * document)).backward()
            scores.append(float(score))
        settle_gradients(model)
        norm = gradient_norm(model.parameters())
        clip_gradients(model.parameters(), 0.5, norm)
        norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
    row = model.score.weight
    held = row.to_local().numel() if isinstance(row, DTensor) else row.numel()
    trained = {name: whole(value.detach()).clone() for name, value in model.named_parameters() if value.requires_grad}
    return {"begun": begun, "scores": scores, "norms": norms, "held": held, "trained": trained}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("mesh", [MeshSpec(shard=2), MeshSpec(tensor=2)], ids=["fsdp", "tensor"])
def test_a_new_head_trains_alike_on_two_ranks(
    mesh: MeshSpec, lora: LoraSettings | None, rank_pool: RankPool, family_folder: Callable[[str], Path]
) -> None:
    folder = family_folder("qwen3")
    [alone] = rank_pool.run(1, train, folder, MeshSpec(), lora)
    ranks = rank_pool.run(2, train, folder, mesh, lora)
    assert [rank["held"] for rank in ranks] == ([32, 0] if mesh.shard == 2 else [32, 32])
    assert alone["norms"] and all(norm > 0 for norm in alone["norms"])
    # float64 but for adapters and their head, which are float32 and summed over ranks in another order
    near = 1e-9 if lora is None else 1e-5
    for rank in ranks:
        assert torch.equal(rank["begun"], alone["begun"])
        assert list(rank["trained"]) == list(alone["trained"]) and SCORE in rank["trained"]
        assert rank["norms"] == pytest.approx(alone["norms"], rel=near)
        for name, value in alone["trained"].items():
            torch.testing.assert_close(rank["trained"][name], value, rtol=near, atol=near)
    seen = (
        ranks[0]["scores"]
        if mesh.tensor == 2
        else [s for pair in zip(*(r["scores"] for r in ranks), strict=True) for s in pair]
    )
    assert seen == pytest.approx(alone["scores"], rel=near)
