"""What a plan that does not fit offers: configs that load, marked by whether they fit, in bounded time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from posttrain_lib.compute import plan_layout, plan_offers
from posttrain_lib.compute.plan import LaunchPlan, PlanError, make_plan, plan_lines, refuse_what_does_not_fit
from posttrain_lib.compute.plan_memory import Estimate, memory
from posttrain_lib.config import RunConfig, load_run_config
from posttrain_lib.conversion.family_test import TINY_SIZES
from posttrain_lib.models.families import spec_from_config
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.schema.mesh import MeshSpec
from steps import plan as plan_step
from steps.pipeline import DEFAULT_CONFIG
from tests.support.tiny_models import CASES
from tests.unit.compute.test_plan import LLAMA_8B, layout, run_config

LLAMA_70B = DEFAULT_CONFIG.parent / "llama_70b.yaml"
LONG_ROWS = ["train.row_tokens=131072"]
ALL_AT_ONCE = [
    *["train.activation_checkpointing=none", "train.precision=fp32", "train.rows_per_step=128"],
    "train.micro_batch_rows=2",
]


@pytest.fixture(scope="module")
def llama() -> ModelSpec:
    return spec_from_config(LLAMA_8B)


def planned(*overrides: str) -> tuple[ModelSpec, RunConfig, LaunchPlan]:
    config = load_run_config(LLAMA_70B, list(overrides))
    spec = plan_step._spec(config)
    assert spec is not None
    return spec, config, make_plan(spec, config)


def refusal(plan: LaunchPlan) -> str:
    with pytest.raises(PlanError) as refused:
        refuse_what_does_not_fit(plan)
    return str(refused.value.fix)


@pytest.mark.parametrize("overrides", [LONG_ROWS, ["compute.gpu=A10"], ["compute.gpu=A10", *ALL_AT_ONCE]])
def test_every_offer_loads_and_needs_what_it_says(overrides: list[str]) -> None:
    spec, config, plan = planned(*overrides)
    assert plan.device_bytes is not None and plan.alternatives
    for offer in plan.alternatives:
        other = make_plan(spec, plan_offers.changed(config, offer.settings))
        assert (other.total_bytes, other.host_bytes) == (offer.total_bytes, offer.host_bytes), offer.change
        assert other.fits is offer.fits
    fits = [offer.fits for offer in plan.alternatives]
    assert fits[0] and fits == sorted(fits, reverse=True), "those that fit come first"


def test_long_rows_lie_over_context_ranks() -> None:
    """70 billion parameters with rows of 131072 tokens: 408 GiB of 78 a device, and the same devices can hold them."""
    _, _, plan = planned(*LONG_ROWS)
    fix = refusal(plan)
    assert fix.startswith("this fits: compute.mesh: {") and "context: 16" in fix
    assert "train.row_tokens" not in fix, "216 GiB do not fit"
    assert any("(does not fit)" in line for line in plan_lines(plan))
    assert any("(fits)" in line for line in plan_lines(plan))


def test_where_no_single_change_fits_several_together_are_tried() -> None:
    _, _, plan = planned("compute.gpu=A10")
    assert refusal(plan).startswith("no single change that was tried fits; these together do: compute.mesh: {")
    together = [offer for offer in plan.alternatives if offer.fits]
    assert all(offer.changes in (2, 3) for offer in together)
    sets = [set(offer.settings) for offer in together]
    assert not any(one < other for one in sets for other in sets), "an offer with a needless change"


def test_where_nothing_fits_the_closest_has_its_figure(llama: ModelSpec) -> None:
    plan = make_plan(llama, run_config({"rows_per_step": 8}, devices_per_node=8, device_memory_gib=2.5))
    fix = refusal(plan)
    closest = min(plan.alternatives, key=lambda offer: offer.total_bytes)
    assert fix.startswith("nothing that was tried fits, up to three changes together. The closest: ")
    assert f"{closest.change} -> {plan_layout.size(closest.total_bytes)}" in fix and not closest.fits
    assert "fits" not in fix.partition("The closest")[2].partition("compute.device_memory_gib")[0]


def test_all_trials_take_less_than_a_second() -> None:
    spec, config, _ = planned("compute.gpu=A10", *LONG_ROWS, *ALL_AT_ONCE)
    start = time.process_time()
    plan_offers.offers(Estimate(spec), config, plan_layout.layout_of(config), plan_offers.Budget(2**30, None))
    assert time.process_time() - start < 1.5, "0.5 s on an idle machine"
    many = plan_layout.layout_of(
        plan_offers.changed(
            config, {"compute.nodes": 90, "compute.mesh": {"shard": 720}} | {"train.rows_per_step": 1440}
        )
    )
    assert len(plan_offers._meshes(Estimate(spec), config, many)) <= 64


@pytest.mark.parametrize(("now", "share", "rows"), [(64, 8, [64, 8]), (10, 4, [8, 4]), (3, 8, []), (4, 8, [8])])
def test_rows_of_a_step_stay_near(now: int, share: int, rows: list[int]) -> None:
    assert plan_offers._rows(now, share) == rows


def test_one_estimate_of_many_layouts_is_that_of_each(llama: ModelSpec) -> None:
    """What layouts share is counted once; nothing that differs may be among it."""
    from posttrain_lib.config.model import Lora

    lora = Lora(rank=16, base_dtype="bfloat16")
    layouts = [
        layout(**changes)
        for changes in (
            {}, {"row_tokens": 256}, {"micro_batch_rows": 2}, {"precision": "bf16"}, {"recomputation": "full"},
            {"mesh": MeshSpec(shard=4)}, {"mesh": MeshSpec(context=4)}, {"mesh": MeshSpec(tensor=4)},
            {"mesh": MeshSpec(shard=4), "offload": True, "cuda": True}, {"lora": lora, "base_bytes": 2},
            {"lora": Lora(rank=8), "base_bytes": 4}, {"moments": 0}, {"mesh": MeshSpec(replicate=2, shard=2)},
        )
    ]  # fmt: skip
    shared = Estimate(llama)
    assert [shared.memory(one) for one in layouts] == [memory(llama, one) for one in layouts]


def offloaded(**compute: Any) -> dict[str, Any]:
    return {"devices_per_node": 8, "offload": "parameters", **compute}


def test_a_nodes_memory_is_held_against_what_it_has(llama: ModelSpec) -> None:
    enough = make_plan(llama, run_config(**offloaded(host_memory_gib=300)))
    assert enough.host_fits and enough.fits and not any("host_memory_gib" in text for text in enough.warnings)
    assert any("in each node's memory, of 300.0 GiB" in line for line in plan_lines(enough))
    short = make_plan(llama, run_config(**offloaded(host_memory_gib=64)))
    assert short.host_bytes == 8_030_261_248 * 28 and short.total_bytes < (short.device_bytes or 0)
    with pytest.raises(PlanError, match=r"a node would need 209\.4 GiB of its own memory and has 64\.0 GiB") as refused:
        refuse_what_does_not_fit(short)
    assert "compute.offload: none" in str(refused.value.fix)


def test_a_node_that_nobody_names_is_warned_of(llama: ModelSpec) -> None:
    plan = make_plan(llama, run_config({"rows_per_step": 16}, **offloaded(nodes=2, host_memory_gib=None)))
    assert plan.fits and plan.host_memory_bytes is None
    assert any("104.7 GiB of each node's memory" in t and "compute.host_memory_gib" in t for t in plan.warnings)


def test_a_node_that_trains_here_has_what_is_free_here(llama: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_layout, "_free_here", lambda: 32 * 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _number: "NVIDIA H100 80GB HBM3")
    assert make_plan(llama, run_config(**offloaded())).host_memory_bytes == 32 * 2**30
    assert make_plan(llama, run_config(**offloaded(gpu="A100"))).host_memory_bytes is None
    assert make_plan(llama, run_config(**offloaded(address="head:6379"))).host_memory_bytes is None


def test_an_offer_of_offloading_names_the_nodes_memory(llama: ModelSpec) -> None:
    plan = make_plan(llama, run_config(devices_per_node=8, device_memory_gib=40, host_memory_gib=1000))
    offer = next(item for item in plan.alternatives if item.settings == {"compute.offload": "parameters"})
    assert offer.host_bytes == 8_030_261_248 * 28 and "209.4 GiB of each node's memory" in str(offer)
    none = make_plan(llama, run_config(devices_per_node=8, device_memory_gib=40, host_memory_gib=10))
    assert not any(item.fits for item in none.alternatives if "compute.offload" in item.settings)


def test_without_a_gpu_what_is_offloaded_is_in_the_same_memory() -> None:
    spec = spec_from_config({**TINY_SIZES, **CASES["llama"]})
    mesh = MeshSpec(shard=2)
    assert memory(spec, layout(mesh=mesh, offload=True)) == memory(spec, layout(mesh=mesh))
    assert Estimate(spec).host_bytes(layout(mesh=mesh, offload=True)) == 0
    assert memory(spec, layout(mesh=mesh, offload=True, cuda=True))["parameters"] == 0
