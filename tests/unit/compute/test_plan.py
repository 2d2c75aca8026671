"""The plan of a job: its mesh against the model, memory against what is really held, refusals and what they advise."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from posttrain_lib.checkpoint.manager import CheckpointManager
from posttrain_lib.compute import plan as planning
from posttrain_lib.compute import plan_layout
from posttrain_lib.compute.plan import PlanError, make_plan, plan_lines, refuse_what_does_not_fit
from posttrain_lib.compute.plan_memory import KINDS, Estimate, Layout, memory, share_of, weights_of
from posttrain_lib.config import RunConfig
from posttrain_lib.config.compute import Gpu
from posttrain_lib.config.model import Lora
from posttrain_lib.conversion.family_test import TINY_SIZES
from posttrain_lib.errors import ConfigError
from posttrain_lib.models.decoder import build_model
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.score import with_score_head
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.ops.linear_cross_entropy import linear_cross_entropy
from posttrain_lib.ops.local import local
from posttrain_lib.optim import build_optimizer
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.training.peaks import DATA_SHEETS
from posttrain_lib.training.state import TrainState
from tests.support.live_storages import LiveStorages
from tests.support.tiny_models import CASES

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def run_config(train: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **compute: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "planned",
            "data": {"sources": [{"name": "a", "generate": {"rows": 100}}], "max_example_tokens": 128},
            "model": {"path": "owner/name", **(model or {})},
            "train": {"steps": 100, "row_tokens": 4096, "rows_per_step": 8, "precision": "bf16", **(train or {})},
            "compute": {"device": "cuda", "gpu": "H100", **compute},
        }
    )


def layout(**changes: Any) -> Layout:
    return Layout(**{"mesh": MeshSpec(), "row_tokens": 128, "rows_per_step": 8, "micro_batch_rows": 1, **changes})


@pytest.fixture(scope="module")
def llama() -> ModelSpec:
    return spec_from_config(LLAMA_8B)


def test_weights_gradients_and_both_moments(llama: ModelSpec) -> None:
    """8.03 billion float32 parameters, four times."""
    held = memory(llama, layout(row_tokens=1024))
    assert list(held) == list(KINDS)
    assert held["parameters"] == held["gradients"] == held["optimiser"] / 2 == 8_030_261_248 * 4
    assert held["gathered weights"] == held["communication"] == held["gradients between micro-batches"] == 0
    assert memory(llama, layout(moments=0))["optimiser"] == 0


def test_what_a_checkpoint_is_written_from_lies_in_the_hosts_memory(llama: ModelSpec) -> None:
    """Weights and both moments once more: beside them on a CPU, beside what is offloaded of a GPU."""
    written = 8_030_261_248 * 12
    assert memory(llama, layout())["checkpoint"] == written
    assert memory(llama, layout(cuda=True))["checkpoint"] == 0
    assert memory(llama, layout(mesh=MeshSpec(replicate=2, shard=2)))["checkpoint"] == written / 4
    lora = Lora(rank=16)
    trained = sum(torch.Size(shape).numel() for _, shape, is_trained in weights_of(llama, lora) if is_trained)
    assert memory(llama, layout(lora=lora))["checkpoint"] == trained * 12
    away = layout(mesh=MeshSpec(shard=2), offload=True, cuda=True)
    assert Estimate(llama).host_bytes(away) == (8_030_261_248 * 16 + written) / 2


def test_the_copy_that_a_checkpoint_is_written_from_is_as_large_as_planned(tmp_path: Path) -> None:
    spec = spec_from_config({**TINY_SIZES, **CASES["llama"]})
    model = build_model(spec)
    optimizer = build_optimizer(model, run_config().train.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    position: Any = SimpleNamespace(state=dict)
    CheckpointManager(tmp_path, 1).save(TrainState(model, optimizer, position, {}))
    written = (tmp_path / "step-00000000/tensors-0.bin").stat().st_size
    counters = 64 * len(list(model.parameters()))  # of AdamW, one a parameter, and where each begins
    assert memory(spec, layout())["checkpoint"] <= written <= memory(spec, layout())["checkpoint"] + 4 * counters


def test_ranks_share_weights_and_gather_two_blocks(llama: ModelSpec) -> None:
    one, eight = layout(), layout(mesh=MeshSpec(shard=8))
    assert memory(llama, eight)["parameters"] == memory(llama, one)["parameters"] / 8
    block = 218_112_000 * 4
    outside = (2 * 128256 * 4096 + 4096) * 4
    assert memory(llama, eight)["gathered weights"] == 2 * block + outside
    copies = memory(llama, layout(mesh=MeshSpec(replicate=8)))
    assert copies["parameters"] == memory(llama, one)["parameters"] and copies["gathered weights"] == 0


def test_micro_batches_keep_whole_gradients(llama: ModelSpec) -> None:
    mesh = MeshSpec(shard=8)
    assert memory(llama, layout(mesh=mesh, rows_per_step=8))["gradients between micro-batches"] == 0
    held = memory(llama, layout(mesh=mesh, rows_per_step=16))
    assert held["gradients between micro-batches"] == 8_030_261_248 * 4


def test_adapters_train_little(llama: ModelSpec) -> None:
    lora = Lora(rank=16, base_dtype="bfloat16")
    trained = sum(torch.Size(shape).numel() for _, shape, is_trained in weights_of(llama, lora) if is_trained)
    held = memory(llama, layout(lora=lora, base_bytes=2))
    assert held["gradients"] == held["optimiser"] / 2 == trained * 4
    assert held["parameters"] == 8_030_261_248 * 2 + trained * 4


#: experts dealt out: whole ones are then shared out, or, of two that four ranks share, their features
_DEALT = [MeshSpec(shard=4, expert=2), MeshSpec(shard=8, expert=2), MeshSpec(replicate=2, shard=2, expert=2)]
_LAID = [
    *itertools.product(
        ["llama", "qwen3_moe", "deepseek_v3", "olmo2", "qwen3_next"],
        [MeshSpec(shard=4), MeshSpec(shard=2, tensor=2), MeshSpec(replicate=2, shard=2)],
    ),
    *itertools.product(["qwen3_moe", "deepseek_v3", "gpt_oss"], _DEALT),
]


@pytest.mark.parametrize(("case", "mesh"), _LAID)
def test_shares_are_those_of_the_real_layout(case: str, mesh: MeshSpec) -> None:
    """The first rank's parameters of a model laid over ranks that exist in name alone (torch's fake backend)."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from posttrain_lib.parallel.apply import apply_parallelism
    from posttrain_lib.parallel.mesh import rank_mesh

    spec = spec_from_config({**TINY_SIZES, **CASES[case]})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.world)
    try:
        model = build_model(spec, device="meta")
        ranks = rank_mesh(mesh, torch.device("cpu"))
        apply_parallelism(model, mesh=ranks, activation_checkpointing="none")
        found = {name: local(parameter).numel() for name, parameter in model.named_parameters()}
    finally:
        dist.destroy_process_group()
    expected = {name: share_of(spec, name, shape, mesh).own for name, shape in spec.parameter_shapes().items()}
    assert found == expected


@pytest.mark.parametrize("case", ["llama, tied", "gemma2", "qwen3_moe"])
def test_a_step_holds_about_what_was_planned(case: str) -> None:
    """The most that a whole step of a real model holds, on a CPU in float32, weights left out on both sides."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 2048}
    spec = spec_from_config({**TINY_SIZES, **CASES[case], **sizes})
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    config = run_config({"precision": "fp32"})
    optimizer = build_optimizer(model, config.train.optimizer)
    tokens = 256
    ids = torch.arange(tokens) % 2048
    cu_seqlens, every = torch.tensor([0, tokens], dtype=torch.int32), torch.arange(tokens)
    live = LiveStorages(model)
    with live:
        for _ in range(2):  # the first step makes the optimiser's state when activations are gone
            loss, _ = model(
                ids,
                every,
                cu_seqlens,
                tokens,
                lambda hidden, head: linear_cross_entropy(hidden, head, ids, torch.ones(tokens), every),
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    held = memory(spec, layout(row_tokens=tokens))
    planned = sum(held.values()) - held["runtime"] - held["parameters"] - held["checkpoint"]  # none was written
    # A plan adds up what a step holds at different times: it may be above, and by no more than half.
    assert 0.95 * live.peak_bytes < planned < 1.5 * live.peak_bytes, (planned, live.peak_bytes, held)


def test_a_score_head_costs_a_stream_and_no_logits() -> None:
    spec = spec_from_config({**TINY_SIZES, **CASES["llama"], "vocab_size": 32_000})
    causal, scoring = (memory(it, layout(row_tokens=256)) for it in (spec, with_score_head(spec)))
    # norm in and out, rows and two gradients of float32; logits, their gradient and that of the row are one column each
    stream, column = 5 * 256 * 32 * 4, 3 * 256 * 4
    assert stream <= scoring["output head"] <= stream + column
    assert causal["output head"] > 10 * scoring["output head"]
    assert causal["parameters"] - scoring["parameters"] == (32_000 - 1) * 32 * 4


def test_a_mesh_is_held_against_the_model(llama: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="cannot cut the key heads") as refused:
        make_plan(llama, run_config(nodes=2, devices_per_node=8, mesh={"tensor": 16}))
    assert refused.value.expected == "one of 2, 4, 8" and "8 over 16 ranks" in str(refused.value.got)
    two_heads = spec_from_config({**LLAMA_8B, "num_key_value_heads": 2})
    with pytest.raises(ConfigError, match="cannot cut the key heads") as refused:
        make_plan(two_heads, run_config(devices_per_node=8, mesh={"tensor": 8}))
    assert refused.value.expected == "2"
    with pytest.raises(ConfigError, match="no experts that could be dealt out"):
        make_plan(llama, run_config(devices_per_node=8, mesh={"expert": 8}))
    experts = spec_from_config({**TINY_SIZES, **CASES["qwen3_moe"]})
    with pytest.raises(ConfigError, match="experts cannot be dealt out evenly"):
        make_plan(experts, run_config(devices_per_node=4, mesh={"expert": 4}))
    with pytest.raises(ConfigError, match="cannot be cut evenly over the ranks that share it"):
        make_plan(experts, run_config({"rows_per_step": 14}, devices_per_node=14, mesh={"expert": 2}))
    linear = spec_from_config({**TINY_SIZES, **CASES["qwen3_next"]})
    with pytest.raises(ConfigError, match="linear attention"):
        make_plan(linear, run_config(devices_per_node=2, mesh={"context": 2}))


def test_what_cannot_fit_names_kinds_and_ways_out(llama: ModelSpec) -> None:
    plan = make_plan(llama, run_config({"micro_batch_rows": 4}))
    assert plan.fits is False
    with pytest.raises(PlanError, match=r"a device would need \d+\.\d GiB and has 78\.4") as refused:
        refuse_what_does_not_fit(plan)
    assert "optimiser 59.8 GiB" in str(refused.value.got)
    single = [item for item in plan.alternatives if item.changes == 1]
    totals = [item.total_bytes for item in single]
    assert totals == sorted(totals) and totals[-1] < plan.total_bytes
    texts = [item.change for item in single]
    for change in ("train.activation_checkpointing: full", "train.micro_batch_rows: 1", "model.lora"):
        assert any(text.startswith(change) for text in texts), change


def test_an_alternative_is_what_the_changed_config_gives(llama: ModelSpec) -> None:
    plan = make_plan(llama, run_config({"micro_batch_rows": 4}))
    changed = make_plan(llama, run_config({"micro_batch_rows": 1}))
    assert next(i.total_bytes for i in plan.alternatives if i.change == "train.micro_batch_rows: 1") == (
        changed.total_bytes
    )


def test_what_fits_is_not_refused_and_needs_no_advice(llama: ModelSpec) -> None:
    train = {"activation_checkpointing": "full", "rows_per_step": 32}
    plan = make_plan(llama, run_config(train, nodes=4, devices_per_node=8))
    assert plan.fits and not plan.alternatives
    refuse_what_does_not_fit(plan)
    text = json.loads(json.dumps(plan.as_json()))
    assert text["memory_bytes"]["parameters"] == plan.memory_bytes["parameters"] and text["fits"] is True


def test_tokens_flops_and_time(llama: ModelSpec) -> None:
    """6 FLOPs a token and matrix parameter, and attention: 12 x layers x width x tokens / 2 of a row, causal."""
    plan = make_plan(llama, run_config({"rows_per_step": 32}, nodes=4, devices_per_node=8))
    assert plan.tokens_per_step == 32 * 4096 and plan.micro_batches == 1
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    tokens = 32 * 4096
    expected = 6 * matrices * tokens + 12 * 32 * 4096 * tokens * 4096 / 2
    assert plan.flops == pytest.approx(expected, rel=1e-3)  # the padded vocabulary's rows
    assert plan.step_seconds == pytest.approx(plan.flops / (32 * 989e12 * 0.4))


def test_axes_that_cross_nodes_are_warned_of(llama: ModelSpec) -> None:
    plan = make_plan(llama, run_config(nodes=4, devices_per_node=2, mesh={"tensor": 4}))
    assert any("tensor 4 reaches beyond a node of 2" in text for text in plan.warnings)
    plan = make_plan(llama, run_config(nodes=2, devices_per_node=4, mesh={"tensor": 4}, device_memory_gib=200))
    assert not any("reaches beyond" in text for text in plan.warnings)
    assert plan.device_bytes == 200 * 2**30


def test_a_device_that_nobody_names_is_not_judged(llama: ModelSpec) -> None:
    plan = make_plan(llama, run_config({"rows_per_step": 16}, nodes=2, devices_per_node=8, gpu=None))
    assert plan.fits is None and plan.step_seconds is None
    refuse_what_does_not_fit(plan)
    assert "not known" in "\n".join(plan_lines(plan))


def test_the_short_form_is_short(llama: ModelSpec) -> None:
    plan = make_plan(llama, run_config({"rows_per_step": 32}, nodes=4, devices_per_node=8))
    assert len(plan_lines(plan, short=True)) == 3 < len(plan_lines(plan))


def test_every_gpu_by_name_has_memory_and_a_peak() -> None:
    assert set(plan_layout.DEVICE_GIB) == set(get_args(Gpu))
    assert DATA_SHEETS and all(planning._peak(name, "bf16") for name in plan_layout.DEVICE_GIB)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.2e-5, "42.0 us"), (0.0031, "3.1 ms"), (38.62, "38.6 s"), (300, "5.0 min"), (77400, "21.5 h")],
)
def test_times_have_a_unit_that_says_something(seconds: float, said: str) -> None:
    assert planning._duration(seconds) == said


@pytest.mark.parametrize(
    ("flops", "said"),
    [(2.5e7, "25 MFLOP"), (4.26e9, "4.26 GFLOP"), (1.5e12, "1.5 TFLOP"), (7.822e18, "7,822 PFLOP")],
)
def test_operations_have_a_unit_that_says_something(flops: float, said: str) -> None:
    assert planning._operations(flops) == said


def test_a_small_model_is_measured_in_mebibytes_and_milliseconds() -> None:
    spec = spec_from_config({**TINY_SIZES, **CASES["llama"]})
    plan = make_plan(spec, run_config({"row_tokens": 128}, device="cpu", device_memory_gib=0.01))
    with pytest.raises(PlanError) as refused:
        refuse_what_does_not_fit(plan)
    assert "GiB" not in str(refused.value).partition("fix:")[0] and "0.0 MiB" not in str(refused.value.got)
    assert " 0.0 h" not in plan_lines(plan)[-1] and " 0.00 s" not in plan_lines(plan)[-1]
