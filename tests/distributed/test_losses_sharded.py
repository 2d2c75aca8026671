"""Losses beyond SFT over two ranks: sharded weights, a sharded vocabulary, a frozen model beside or underneath."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain_lib.losses import build_loss
from posttrain_lib.losses.contract import write_examples
from posttrain_lib.schema.mesh import MeshSpec
from tests.support.rank_pool import RankPool
from tests.support.sharded_gradients import Work
from tests.support.sharded_losses import compute
from tests.support.tiny_models import write_tiny_model

#: float64 sums in another order; measured 1e-14 of a gradient's largest entry
EXACT = 1e-10
TERMS = {"label_smoothing": 0.1, "z_loss": 0.01, "entropy_bonus": 0.1}
CASES = [
    ("dpo", {}, MeshSpec(shard=2), "lora"),
    ("sigmoid", {}, MeshSpec(tensor=2), ""),
]
MORE = [
    ("dpo", {"sft_weight": 0.3}, MeshSpec(shard=2), ""),
    ("dpo", {}, MeshSpec(tensor=2), ""),
    ("orpo", {}, MeshSpec(shard=2), ""),
    ("sigmoid", {}, MeshSpec(shard=2), ""),
    ("sft", TERMS, MeshSpec(shard=2), ""),
    ("sft", TERMS, MeshSpec(tensor=2), "lora"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    write_tiny_model("llama", folder / "policy")
    write_tiny_model("llama", folder / "reference", rms_norm_eps=1e-2)
    for kind in ("document", "pair"):
        write_examples(folder / kind, kind, seed=0)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "mesh", "lora"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_two_ranks_equal_one(
    rank_pool: RankPool, folder: Path, name: str, options: dict, mesh: MeshSpec, lora: str
) -> None:
    store = str(folder / build_loss(name, options).kind)
    reference = str(folder / "reference")
    alone = compute(0, Work(str(folder / "policy"), store, lora=lora), reference, name, options)
    work = Work(str(folder / "policy"), store, mesh, lora)
    for found in rank_pool.run(2, compute, work, reference, name, options):
        assert found.loss == pytest.approx(alone.loss, rel=EXACT)
        torch.testing.assert_close(found.sources, alone.sources, rtol=EXACT, atol=EXACT)
        assert found.norm == pytest.approx(alone.norm, rel=EXACT)
        assert found.grads.keys() == alone.grads.keys()
        for parameter, gradient in alone.grads.items():
            bound = EXACT * float(gradient.abs().max())
            torch.testing.assert_close(found.grads[parameter], gradient, rtol=0, atol=bound, msg=parameter)
