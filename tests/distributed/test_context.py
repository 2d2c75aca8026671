"""Ranks that share a row's tokens against one rank that has them all: loss and every gradient, and whole trainings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.losses.sft import SFTLoss
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_folder
from posttrain_lib.models.lora import LoraDecoder, apply_lora, init_adapters
from posttrain_lib.parallel.apply import apply_parallelism
from posttrain_lib.parallel.compilation import compile_blocks
from posttrain_lib.parallel.mesh import rank_mesh
from posttrain_lib.parallel.process_group import free_port
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.mesh import SINGLE, MeshSpec
from posttrain_lib.schema.reports import StepReport
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.train_step import StepSettings, accumulate_gradients
from tests.distributed.test_two_ranks import assert_near
from tests.distributed.test_two_ranks import run_rank as run_trainer
from tests.oracles.prefix_tree import TREE
from tests.oracles.tiny_job import make_job, tiny_config
from tests.support.lora_cases import everything_of
from tests.support.packed_batch import batch_of, plain, two_rows
from tests.support.packed_row import gradients
from tests.support.rank_pool import RankPool

CPU = torch.device("cpu")
#: float64 sums in another order, through four layers (gemma2 on two ranks: 1e-16); gradients of keys that do not come
#: back there are 5e-2 off
LIMIT = 1e-10
_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Order:
    """What the ranks of one case do."""

    folder: str
    mesh: MeshSpec
    recompute: Any = "none"
    compiled: bool = False
    lora: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """Figures of one rank: the loss, loss and weight by source, and whole gradients."""

    loss: float
    sources: Tensor
    grads: dict[str, Tensor]


def micro_batches(data_rank: int, groups: int) -> list[PackedBatch]:
    """Four rows of each kind: many documents and padding, one as long as the row, documents that end at a cut, shared
    beginnings; and two rows in one. Dealt out to the groups that see different rows."""

    def row(*lengths: int) -> PackedBatch:
        return batch_of(plain(*lengths), _TOKENS, vocabulary=96)

    everything = [
        two_rows(row(5, 1, 17, 9, 3, 20), row(_TOKENS)),
        two_rows(row(16, 16, 8, 24), row(2, 61)),
        batch_of(TREE, _TOKENS, vocabulary=96),
        row(*[4] * 16),
    ]
    return everything[data_rank::groups]


def give_values(model: LoraDecoder) -> None:
    """Fresh adapters are zeros on one side, whose other side gets no gradient: the same random numbers on all ranks."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                whole: Any = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.1
                if isinstance(value, DTensor):
                    whole = distribute_tensor(whole, value.device_mesh, value.placements, src_data_rank=None)
                value.copy_(whole)


def run_rank(rank: int, order: Order) -> Result:
    """One rank's part of the job, inside the group of its ranks if there are several."""
    mesh = rank_mesh(order.mesh, CPU)
    spec = spec_from_folder(order.folder)
    model: Any = build_model(spec, dtype=torch.float64, device="meta")
    if order.lora:
        model = apply_lora(model, everything_of(model)).double()  # adapters are float32 otherwise
    if order.compiled:
        compile_blocks(model, backend="aot_eager")  # as apply_parallelism does, without a C++ compiler
    apply_parallelism(model, mesh=mesh, activation_checkpointing=order.recompute)
    model.to_empty(device="cpu")
    load_hf_weights(model, spec, order.folder)
    if order.lora:
        init_adapters(model, seed=0)
        give_values(model)
    settings = StepSettings(mesh=mesh, precision="fp32", clip_norm=None, sources=3, name_example=str)
    batches = micro_batches(mesh.data_rank, order.mesh.data_degree)
    (divisor,) = mesh.sum_over_rows([sum(batch.weight for batch in batches)])
    loss, sources = accumulate_gradients(model, SFTLoss(), batches, settings, global_divisor=divisor)
    return Result(loss, sources, gradients(model))


def assert_equal(order: Order, rank_pool: RankPool) -> None:
    """Every rank of the order gives what one rank alone gives."""
    alone = run_rank(0, dataclasses.replace(order, mesh=SINGLE, recompute="none", compiled=False))
    assert alone.loss > 1
    assert all(float(grad.abs().max()) > 0 for name, grad in alone.grads.items() if "experts" not in name)
    for result in rank_pool.run(order.mesh.world, run_rank, order):
        assert abs(result.loss - alone.loss) < LIMIT
        torch.testing.assert_close(result.sources, alone.sources, rtol=LIMIT, atol=LIMIT)
        assert list(result.grads) == list(alone.grads)
        for name, expected in alone.grads.items():
            apart = float((result.grads[name] - expected).abs().max() / expected.abs().max().clamp(min=1.0))
            assert apart < LIMIT, name


TWO, FOUR = MeshSpec(context=2), MeshSpec(context=4)
WITH_SHARD, WITH_TENSOR = MeshSpec(shard=2, context=2), MeshSpec(context=2, tensor=2)
#: case -> what is run in the fast suite, and what besides
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"mesh": WITH_SHARD, "recompute": "full"}),
    ("gemma2", {"mesh": FOUR}),
    ("gpt_oss", {"mesh": TWO, "recompute": "selective"}),
    ("deepseek_v3", {"mesh": FOUR, "lora": True}),
]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"mesh": TWO}),
    ("llama", {"mesh": WITH_TENSOR}),
    ("llama, tied", {"mesh": FOUR, "lora": True}),
    ("gemma2", {"mesh": WITH_SHARD, "lora": True}),
    ("gpt_oss", {"mesh": FOUR}),
    ("deepseek_v3", {"mesh": TWO, "recompute": "full"}),
    ("mixtral", {"mesh": WITH_SHARD}),
    ("qwen3", {"mesh": MeshSpec(replicate=2, context=2), "compiled": True, "recompute": "full"}),
    ("olmo3", {"mesh": TWO}),
]


def _named(case: str, settings: dict[str, Any], *marks: Any) -> Any:
    mesh = [f"{axis} {degree}" for axis, degree in vars(settings["mesh"]).items() if degree > 1]
    others = [name if value is True else str(value) for name, value in settings.items() if name != "mesh"]
    return pytest.param(case, settings, id=", ".join([case, *mesh, *others]), marks=marks)


@pytest.mark.parametrize(
    ("case", "settings"),
    [*(_named(*case) for case in CASES), *(_named(*case, pytest.mark.slow) for case in MORE)],
)
def test_a_row_over_ranks_is_a_row_on_one(
    case: str, settings: dict[str, Any], family_folder: Callable[[str], Path], rank_pool: RankPool
) -> None:
    assert_equal(Order(str(family_folder(case)), **settings), rank_pool)


def train_rank(rank: int, job: TrainJob, stop_after: int | None) -> list[StepReport]:
    """One rank of a whole training."""
    return run_trainer(dataclasses.replace(job, rank=rank), stop_after)


def losses(report: StepReport) -> tuple[Any, ...]:
    """What all ranks must report with the same bits."""
    return report.step, report.loss, report.grad_norm, report.held_out, report.source_loss, report.event


def train_on(rank_pool: RankPool, job: TrainJob, mesh: MeshSpec, stop_after: int | None = None) -> list[StepReport]:
    """The first rank's reports; all of them are the same but for clocks."""
    job = dataclasses.replace(job, mesh=mesh, rendezvous=f"127.0.0.1:{free_port()}")
    first, *others = rank_pool.each(mesh.world, train_rank, job, stop_after)
    assert all(list(map(losses, other)) == list(map(losses, first)) for other in others)
    return first


@pytest.mark.parametrize(
    "mesh", [pytest.param(TWO, marks=pytest.mark.slow), WITH_SHARD], ids=["context 2", "shard 2 x context 2"]
)
def test_a_training_over_context_ranks_is_one_on_one_rank(rank_pool: RankPool, tmp_path: Path, mesh: MeshSpec) -> None:
    """Losses, gradient norms, held-out losses by source; tokens, weights, FLOPs and rows of the same stream."""
    config = tiny_config(steps=5, clip_norm=0.1)
    alone = run_trainer(make_job(tmp_path, config, work="alone"))
    assert_near(train_on(rank_pool, make_job(tmp_path, config, work="over"), mesh), alone)
    # what context ranks left, one rank goes on from
    train_on(rank_pool, make_job(tmp_path, config, work="cut"), mesh, stop_after=2)
    resumed = run_trainer(make_job(tmp_path, config, work="cut"))
    assert resumed[0].event.startswith("resumed")
    assert_near(resumed[1:], alone[3:])
