"""Any mesh computes what one process does: loss, losses by source, norm and every gradient, by the step's own code."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations, count, product
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.schema.mesh import MeshSpec
from tests.oracles.tiny_job import write_store
from tests.support.rank_pool import RankPool
from tests.support.sharded_gradients import Outcome, Work, collectives, compute, shards_of

#: float64 sums in another order through four layers; measured 1e-14 of a gradient's largest entry
EXACT = 1e-10
FACTORS: dict[str, list[Any]] = {
    # biases and a head of its own; caps, windows and a tied head; mixture; latents and groups of experts; delta rule
    "case": ["llama", "gemma2", "qwen3_moe", "deepseek_v3", "qwen3_next"],
    "mesh": [
        MeshSpec(shard=2),
        MeshSpec(shard=4),
        MeshSpec(replicate=2, shard=2),
        MeshSpec(tensor=2),
        MeshSpec(shard=2, tensor=2),
    ],
    "lora": ["", "lora"],
    "micro_batches": [1, 2],
    "recompute": ["none", "selective", "full"],
}


def pairs_of(combination: dict[str, Any]) -> set[Any]:
    return set(combinations(combination.items(), 2))


def pairwise() -> list[dict[str, Any]]:
    """Every case over every mesh; of the other factors whatever covers each pair of values."""
    wanted = {
        pair for values in product(*FACTORS.values()) for pair in pairs_of(dict(zip(FACTORS, values, strict=True)))
    }
    for seed in count():
        draw = random.Random(seed)
        rest = list(FACTORS)[2:]
        chosen = [
            {"case": case, "mesh": mesh, **{name: draw.choice(FACTORS[name]) for name in rest}}
            for case, mesh in product(FACTORS["case"], FACTORS["mesh"])
        ]
        if set().union(*map(pairs_of, chosen)) == wanted:
            return chosen
    raise AssertionError("unreachable")


def label(mesh: MeshSpec) -> str:
    return " ".join(f"{name} {degree}" for name, degree in vars(mesh).items() if degree > 1)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_store(tmp_path_factory.mktemp("rows") / "store", 20, seed=1))


@pytest.fixture(scope="session")
def alone(store: str) -> Callable[..., Outcome]:
    """One process's figures, computed once for each model."""
    known: dict[tuple[str, str], Outcome] = {}

    def figures(folder: Path, lora: str) -> Outcome:
        key = (str(folder), lora)
        if key not in known:
            known[key] = compute(0, Work(str(folder), store, lora=lora))
        return known[key]

    return figures


def assert_equal(ranks: list[Outcome], expected: Outcome) -> None:
    for found in ranks:
        assert found.loss == pytest.approx(expected.loss, rel=EXACT)
        assert found.norm == pytest.approx(expected.norm, rel=EXACT)
        torch.testing.assert_close(found.sources, expected.sources, rtol=EXACT, atol=0)
        assert set(found.grads) == set(expected.grads)
        for name, grad in expected.grads.items():
            assert found.grads[name].shape == grad.shape, name
            assert float((found.grads[name] - grad).abs().max()) <= EXACT * max(1e-3, float(grad.abs().max())), name


@pytest.mark.parametrize(
    "combination",
    pairwise(),
    ids=lambda chosen: f"{chosen['case']}-{label(chosen['mesh'])}",
)
def test_a_mesh_computes_what_one_process_does(
    combination: dict[str, Any],
    store: str,
    alone: Callable[..., Outcome],
    family_folder: Callable[[str], Path],
    rank_pool: RankPool,
) -> None:
    options = dict(combination)
    folder = family_folder(options.pop("case"))
    ranks = rank_pool.run(options["mesh"].world, compute, Work(str(folder), store, **options))
    assert_equal(ranks, alone(folder, options["lora"]))


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", "lora", "dora"])
@pytest.mark.parametrize(
    "mesh", [MeshSpec(tensor=2), MeshSpec(shard=2, tensor=2), MeshSpec(replicate=2, tensor=2)], ids=label
)
@pytest.mark.parametrize("case", ["llama, tied", "olmo2", "gpt_oss", "granite", "phi3", "qwen3"])
def test_tensor_ranks_of_other_families(
    case: str,
    mesh: MeshSpec,
    lora: str,
    store: str,
    alone: Callable[..., Outcome],
    family_folder: Callable[[str], Path],
    rank_pool: RankPool,
) -> None:
    """Sinks, norms over all heads, joined projections, multipliers; adapters with lengths of their own."""
    folder = family_folder(case)
    ranks = rank_pool.run(mesh.world, compute, Work(str(folder), store, mesh, lora, 2))
    assert_equal(ranks, alone(folder, lora))


@pytest.mark.parametrize("mesh", [MeshSpec(tensor=2), MeshSpec(replicate=2, tensor=2)], ids=label)
def test_a_padded_vocabulary_is_cut_and_its_padding_learns_nothing(
    mesh: MeshSpec, store: str, family_folder: Callable[[str], Path], rank_pool: RankPool
) -> None:
    folder = str(family_folder("llama, tied"))
    expected = compute(0, Work(folder, store, padded=20))
    assert expected.grads["embed_tokens.weight"].shape[0] == 100
    ranks = rank_pool.run(mesh.world, compute, Work(folder, store, mesh, padded=20))
    assert_equal(ranks, expected)
    assert not ranks[1].grads["embed_tokens.weight"][96:].any()


@pytest.mark.parametrize(
    "mesh", [MeshSpec(shard=2), MeshSpec(replicate=2, shard=2), MeshSpec(shard=2, tensor=2)], ids=label
)
def test_micro_batches_before_the_last_reduce_no_gradient(
    mesh: MeshSpec, store: str, family_folder: Callable[[str], Path], rank_pool: RankPool
) -> None:
    """As many reductions over ranks with other rows as there are units, whatever number of micro-batches."""
    folder = str(family_folder("llama"))
    one, two = (
        rank_pool.run(mesh.world, collectives, Work(folder, store, mesh, micro_batches=number))[0] for number in (1, 2)
    )
    reduced = "c10d::_reduce_scatter_base_"
    assert one[reduced] == two[reduced] == 5, "four blocks and the root"
    if mesh.tensor == 1:  # tensor ranks add activations up, in every micro-batch
        assert one["c10d::allreduce_"] == two["c10d::allreduce_"] == (6 if mesh.replicate > 1 else 1), "and the loss"


def test_a_rank_holds_its_share_alone(store: str, family_folder: Callable[[str], Path], rank_pool: RankPool) -> None:
    """Matrices that are cut lie once over shard and tensor ranks, and are copied over replicas."""
    folder = str(family_folder("llama"))
    (whole,) = [shards_of(0, Work(folder, store))]
    for mesh, parts in [(MeshSpec(shard=4), 4), (MeshSpec(replicate=2, shard=2), 2), (MeshSpec(shard=2, tensor=2), 4)]:
        for held in rank_pool.run(mesh.world, shards_of, Work(folder, store, mesh)):
            assert held["layers.0.mlp.up_proj.weight"] * parts == whole["layers.0.mlp.up_proj.weight"]
            assert held["embed_tokens.weight"] * parts == whole["embed_tokens.weight"]
