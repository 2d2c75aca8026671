"""Expert parallelism: mixtures whose experts lie over ranks compute what one process does."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.errors import ConfigError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import whole
from posttrain_lib.ops.experts import mixture
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.compilation import compile_blocks
from posttrain_lib.parallel.experts import AllToAll
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.schema.mesh import SINGLE, MeshSpec
from tests.oracles.tiny_job import write_store
from tests.support.packed_row import ROWS, run_row
from tests.support.rank_pool import RankPool
from tests.support.sharded_gradients import Outcome, Work, build, compute
from tests.support.tiny_models import write_tiny_model

#: float64 in another order through four layers: 1e-14 measured; a missing sum over ranks is of order 1
EXACT = 1e-10
#: adapters and what is added to their gradients are float32: 6e-8 each
NEAR = 1e-6
#: what config.json of each family calls the number of experts
COUNTS = {
    "qwen3_moe": "num_experts",
    "mixtral": "num_local_experts",
    "olmoe": "num_experts",
    "gpt_oss": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
    "qwen3_next": "num_experts",
}
PAIR = MeshSpec(shard=2, expert=2)
QUADS = {
    "expert 2 x shard 4": MeshSpec(shard=4, expert=2),
    "expert 4": MeshSpec(shard=4, expert=4),
    "replicate 2 x expert 2": MeshSpec(replicate=2, shard=2, expert=2),
    "tensor 2 x expert 2": MeshSpec(shard=2, tensor=2, expert=2),
    "context 2 x shard 2, expert 4": MeshSpec(shard=2, context=2, expert=4),
}
Works = Callable[..., Work]


@pytest.fixture(scope="module")
def work_of(tmp_path_factory: pytest.TempPathFactory) -> Works:
    """(family, number of experts) -> the work of computing a tiny model's loss and gradients."""
    root = tmp_path_factory.mktemp("experts")
    store = write_store(root / "store", 15, seed=3, longest=16)

    def work(family: str, experts: int = 8, **options: Any) -> Work:
        path, changes = root / f"{family}-{experts}", {COUNTS[family]: experts} if experts else {}
        folder = path if path.is_dir() else write_tiny_model(family, path, **changes)
        return Work(str(folder), str(store), **options)

    return work


@pytest.fixture(scope="module")
def alone() -> Callable[[Work], Outcome]:
    """The same work in this process, once."""
    known: dict[Work, Outcome] = {}

    def run(work: Work) -> Outcome:
        work = dataclasses.replace(work, mesh=SINGLE, recompute="none", micro_batches=1)
        if work not in known:
            known[work] = compute(0, work)
        return known[work]

    return run


def assert_same(found: list[Outcome], expected: Outcome, within: float = EXACT) -> None:
    for result in found:
        assert result.loss == pytest.approx(expected.loss, rel=within)
        assert result.norm == pytest.approx(expected.norm, rel=within)
        assert list(result.grads) == list(expected.grads)
        for name, wanted in expected.grads.items():
            limit = within * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(
                result.grads[name], wanted, rtol=0, atol=limit, msg=lambda text, n=name: f"{n}: {text}"
            )


def held(_rank: int, work: Work) -> dict[str, tuple[torch.Size, int]]:
    """What a checkpoint would be told of the experts: the shape of all, and how many entries lie on this rank."""
    state = get_model_state_dict(build(work)[0])
    return {
        name: (value.shape, value.to_local().numel() if isinstance(value, DTensor) else value.numel())
        for name, value in state.items()
        if ".experts." in name
    }


def _grid() -> list[Any]:
    """Every family with every mesh, ways of recomputing and micro-batches in turn; of four ranks one each is fast."""
    families = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3")
    cases = []
    for row, family in enumerate(families):
        for column, mesh in enumerate(("expert 2", *QUADS)):
            mode, parts = ("none", "selective", "full")[(row + 2 * column) % 3], 1 + (row + column) % 2
            marks = [pytest.mark.slow] if column and (row + column) % 5 else []
            cases.append(pytest.param(family, mesh, mode, parts, marks=marks, id=f"{family}, {mesh}, {mode}, {parts}"))
    return cases


@pytest.mark.parametrize(("family", "mesh", "mode", "parts"), _grid())
def test_ranks_compute_what_one_process_does(
    family: str,
    mesh: str,
    mode: str,
    parts: int,
    rank_pool: RankPool,
    work_of: Works,
    alone: Callable[[Work], Outcome],
) -> None:
    spec = {"expert 2": PAIR, **QUADS}[mesh]
    work = work_of(family, mesh=spec, recompute=mode, micro_batches=parts)
    assert_same(rank_pool.run(spec.world, compute, work), alone(work))


@pytest.mark.parametrize("mesh", ["expert 2 x shard 4", "replicate 2 x expert 2"])
def test_a_checkpoint_sees_all_experts_and_a_rank_has_its_share(mesh: str, rank_pool: RankPool, work_of: Works) -> None:
    work = work_of("gpt_oss", mesh=QUADS[mesh])
    whole_ones = held(0, dataclasses.replace(work, mesh=SINGLE))
    assert len(whole_ones) == 4 * 6
    for found in rank_pool.run(4, held, work):
        assert {name: shape for name, (shape, _) in found.items()} == {n: shape for n, (shape, _) in whole_ones.items()}
        for name, (shape, entries) in found.items():
            assert entries * work.mesh.shard == shape.numel(), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next"])
def test_features_are_cut_where_whole_experts_cannot_be_shared_out(
    family: str, rank_pool: RankPool, work_of: Works, alone: Callable[[Work], Outcome]
) -> None:
    """Six experts, three for each of two ranks, which two more share; and a family whose shared expert has a gate."""
    work = work_of(family, 6, mesh=QUADS["expert 2 x shard 4"], recompute="full")
    assert_same(rank_pool.run(4, compute, work), alone(work))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_adapters_of_experts_are_dealt_out_with_them(
    family: str, rank_pool: RankPool, work_of: Works, alone: Callable[[Work], Outcome]
) -> None:
    work = work_of(family, mesh=PAIR, recompute="selective", lora="lora")
    expected = alone(work)
    assert any("experts.up_proj_lora_up" in name for name in expected.grads)
    assert_same(rank_pool.run(2, compute, work), expected, within=NEAR)
    shape, entries = rank_pool.run(2, held, work)[1]["layers.0.mlp.experts.up_proj_lora_down"]
    assert entries * 2 == shape.numel()


def test_one_rank_gets_every_token(
    rank_pool: RankPool, work_of: Works, alone: Callable[[Work], Outcome], tmp_path: Path
) -> None:
    """The other gets no row, forward and backward, and takes part in every all-to-all."""
    plain = work_of("gpt_oss", mesh=PAIR, recompute="full")
    folder = Path(shutil.copytree(plain.model, tmp_path / "one"))
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("router.bias"):
            weights[name] = torch.tensor([200.0, 100.0] + [0.0] * 6)  # two for each token, both on the first rank
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    work = dataclasses.replace(plain, model=str(folder))
    expected = alone(work)
    busy = expected.grads["layers.0.mlp.experts.gate_proj"].flatten(1).any(1)
    assert busy.tolist() == [True, True] + [False] * 6
    assert_same(rank_pool.run(2, compute, work), expected)


def one_row(_rank: int, work: Work, compiled: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states and gradients of a row that is the same on every rank."""
    spec = spec_from_folder(work.model)
    model = build_model(spec, torch.float64, device="meta")
    if compiled:  # by a compiler of torch's that needs no other
        compile_blocks(model, backend="aot_eager")
    apply_parallelism(model, mesh=rank_mesh(work.mesh, torch.device("cpu")), activation_checkpointing=work.recompute)
    model.to_empty(device="cpu")
    load_hf_weights(model, spec, work.model)
    return run_row(model, ROWS[0])


def test_compiled_blocks_compute_the_same(rank_pool: RankPool, work_of: Works) -> None:
    work = work_of("qwen3_moe", mesh=PAIR, recompute="full")
    hidden, grads = rank_pool.run(2, one_row, work, False)[0]
    found_hidden, found = rank_pool.run(2, one_row, work, True)[0]
    torch.testing.assert_close(found_hidden, hidden, rtol=0, atol=EXACT)
    assert list(found) == list(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=EXACT * max(1.0, float(grad.abs().max())))


def exchange_rows(rank: int, dtype: torch.dtype) -> list[Tensor]:
    """A mixture over two ranks of 13 and 4 tokens, or (rank -1) in a process that has the tokens of both: output, then
    gradients of tokens, of their weights and of the experts."""
    generator = torch.Generator().manual_seed(0)
    experts, hidden = 6, 16
    tokens = torch.randn(17, hidden, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:3] for _ in range(17)])
    shares = torch.rand(17, 3, generator=generator)
    gate, up, down = (torch.randn(experts, hidden, hidden, generator=generator).to(dtype) for _ in range(3))
    pull = torch.randn(17, hidden, generator=generator).to(dtype)
    mine = {-1: slice(None), 0: slice(0, 13), 1: slice(13, None)}[rank]
    exchange = None
    if rank >= 0:
        deal = init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
        gate, up, down = (distribute_tensor(value, deal, [Shard(0)]) for value in (gate, up, down))
        exchange = AllToAll(deal.get_group())
    trained = [value.requires_grad_() for value in (tokens[mine].clone(), shares[mine].clone(), gate, up, down)]
    rows, weights, *matrices = trained
    output = mixture(rows, ids[mine], weights, *matrices, activation=lambda g, u: g * u, exchange=exchange)
    grads = torch.autograd.grad(output, trained, pull[mine])
    return [output.detach(), *(whole(grad) for grad in grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_in_the_order_of_one_process_with_the_ranks_tokens_in_turn(
    dtype: torch.dtype, rank_pool: RankPool
) -> None:
    expected = exchange_rows(-1, dtype)
    first, second = rank_pool.run(2, exchange_rows, dtype)
    for number, wanted in enumerate(expected):
        found = torch.cat((first[number], second[number])) if number < 3 else first[number]
        assert torch.equal(found, wanted), f"tensor {number}"
    assert all(torch.equal(*pair) for pair in zip(first[3:], second[3:], strict=True))


def refusal(_rank: int, work: Work) -> str:
    try:
        build(work)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("family", "experts", "words"),
    [("mixtral", 5, "5 experts over 2 ranks"), ("qwen3", 0, "no experts")],
)
def test_what_cannot_be_dealt_out_is_refused(
    family: str, experts: int, words: str, rank_pool: RankPool, work_of: Works
) -> None:
    for said in rank_pool.run(2, refusal, work_of(family, experts, mesh=PAIR)):
        assert words in said
        assert "compute.mesh.expert" in said
