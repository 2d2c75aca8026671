"""What a run will do and need, before anything starts: mesh, memory of a device, tokens, FLOPs, time.

Made from the run's config and the model's spec alone, so that a run over hundreds of devices can be planned on a
laptop. What is an assumption says so.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from posttrain_lib.compute.plan_layout import check_mesh, device_of, host_of, layout_of, size
from posttrain_lib.compute.plan_memory import KINDS, Estimate, Layout
from posttrain_lib.compute.plan_offers import Alternative, Budget, offers
from posttrain_lib.config import RunConfig
from posttrain_lib.errors import ConfigError
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from posttrain_lib.schema.mesh import MeshSpec

#: share of a GPU's peak that the time is stated at
UTILISATION = 0.4
AXES = {
    "replicate": "copies of the model, each for other rows; gradients are summed over them",
    "shard": "devices that share one copy's weights (FSDP2), each for other rows",
    "context": "devices that share a row's tokens",
    "tensor": "devices that share a token's heads, features and vocabulary",
    "expert": "devices that experts are dealt out over, within shard x context",
}


class PlanError(ConfigError):
    """A run that cannot fit."""


@dataclass(frozen=True)
class LaunchPlan:
    """The plan of a training job. ``memory_bytes``: of one device, by kind; ``device_bytes`` what one has, None where
    that is not known, and ``device`` what it is. ``host_bytes``: of a node, for offloaded shares;
    ``host_memory_bytes`` what a node has, None where that is not known or not needed. ``flops`` of a step at most, with
    every token trained and every row one document. ``alternatives``: changes that fit, then such as need less."""

    mesh: MeshSpec
    nodes: int
    devices_per_node: int
    memory_bytes: dict[str, int]
    host_bytes: int
    device: str
    device_bytes: int | None
    tokens_per_step: int
    micro_batches: int
    steps: int | None
    flops: float
    peak_flops: float | None
    host_memory_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        """Of one device."""
        return sum(self.memory_bytes.values())

    @property
    def fits(self) -> bool | None:
        """Whether a device and a node have as much; None where a device's memory is not known."""
        if not self.host_fits:
            return False
        return None if self.device_bytes is None else self.total_bytes <= self.device_bytes

    @property
    def host_fits(self) -> bool:
        """Whether a node has the memory for offloaded shares, as far as that is known."""
        return self.host_memory_bytes is None or self.host_bytes <= self.host_memory_bytes

    @property
    def step_seconds(self) -> float | None:
        """At :data:`UTILISATION` of the device's peak; None without one."""
        return None if self.peak_flops is None else self.flops / (self.mesh.world * self.peak_flops * UTILISATION)

    def as_json(self) -> dict[str, Any]:
        """For receipts and cards."""
        return {
            **dataclasses.asdict(self),
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "step_seconds": self.step_seconds,
        }


def make_plan(spec: ModelSpec, config: RunConfig, beside: ModelSpec | None = None) -> LaunchPlan:
    """The plan of a run with a model of our own definition, and with a frozen one that runs beside it.

    Raises:
        PlanError: the mesh does not fit the model.
    """
    spec = with_padded_vocabulary(spec, config.model.pad_vocabulary_to)
    check_mesh(spec, config)
    layout = layout_of(config)
    estimate = Estimate(spec, beside and with_padded_vocabulary(beside, config.model.pad_vocabulary_to))
    device, device_bytes = device_of(config)
    train, compute = config.train, config.compute
    plan = LaunchPlan(
        mesh=layout.mesh,
        nodes=compute.nodes,
        devices_per_node=compute.devices_per_node,
        memory_bytes=estimate.memory(layout),
        host_bytes=estimate.host_bytes(layout) * compute.devices_per_node,
        device=device,
        device_bytes=device_bytes,
        tokens_per_step=train.rows_per_step * train.row_tokens,
        micro_batches=layout.micro_batches,
        steps=train.steps,
        flops=_flops(spec, config),
        peak_flops=_peak(compute.gpu, train.precision),
        host_memory_bytes=host_of(config) if layout.offload and layout.cuda else None,
        warnings=_warnings(config, layout),
    )
    if plan.fits is False or (device_bytes is not None and plan.total_bytes > 0.9 * device_bytes):
        budget = Budget(device_bytes, host_of(config))
        plan = dataclasses.replace(plan, alternatives=offers(estimate, config, layout, budget))
    if plan.host_bytes and plan.host_memory_bytes is None:
        text = f"{size(plan.host_bytes)} of each node's memory are needed for offloaded shares, and what a node has is "
        plan = dataclasses.replace(plan, warnings=(*plan.warnings, text + "not known: compute.host_memory_gib says it"))
    return plan


def refuse_what_does_not_fit(plan: LaunchPlan) -> None:
    """Stop before a launch that would run out of memory, of a device or of a node.

    Raises:
        PlanError: naming the largest kinds, and changes that fit or come closest.
    """
    if plan.fits is not False:
        return
    what, got, expected, remark = [], [], [], []
    if plan.device_bytes is not None and plan.total_bytes > plan.device_bytes:
        largest = sorted(plan.memory_bytes.items(), key=lambda item: -item[1])[:4]
        what.append(f"a device would need {size(plan.total_bytes)} and has {size(plan.device_bytes)}")
        got.append("; ".join(f"{kind} {size(count)}" for kind, count in largest if count))
        expected.append(f"at most {size(plan.device_bytes)} ({plan.device})")
        remark.append("compute.device_memory_gib says what a device has, where the plan is wrong about it")
    if not plan.host_fits:
        assert plan.host_memory_bytes is not None
        has = size(plan.host_memory_bytes)
        what.append(f"a node would need {size(plan.host_bytes)} of its own memory and has {has}")
        got.append(f"offloaded shares of {plan.devices_per_node} device(s) {size(plan.host_bytes)} a node")
        expected.append(f"at most {has} a node")
        remark.append("compute.host_memory_gib says what a node has, where the plan is wrong about it")
    raise PlanError(
        "; ".join(what),
        where="compute, train",
        got="; ".join(got),
        expected="; ".join(expected),
        fix=". ".join([_advice(plan), *remark]),
    )


def _advice(plan: LaunchPlan) -> str:
    """What to change: what fits, or that nothing tried does and what comes closest."""
    fitting = [item for item in plan.alternatives if item.fits]
    shown = "; ".join(str(item) for item in fitting[:5])
    if fitting and fitting[0].changes == 1:
        return f"each of these fits: {shown}" if len(fitting) > 1 else f"this fits: {shown}"
    if fitting:
        return f"no single change that was tried fits; these together do: {shown}"
    nothing = "nothing that was tried fits, up to three changes together"
    if not plan.alternatives:
        return f"{nothing}: use more devices, or larger ones"
    return f"{nothing}. The closest: {plan.alternatives[0]}. Besides, use more devices, or larger ones"


def _peak(gpu: str | None, precision: str) -> float | None:
    """FLOP/s of a GPU by name, from its data sheet."""
    from posttrain_lib.training.peaks import DATA_SHEETS

    if gpu is None:
        return None
    sheet = next((sheet for sheet in DATA_SHEETS if re.search(sheet.name, gpu.removesuffix("-40"))), None)
    if sheet is None:
        return None
    return (sheet.bf16 if precision == "bf16" else sheet.fp32) * 1e12


def _flops(spec: ModelSpec, config: RunConfig) -> float:
    """Model FLOPs of a step, forward and backward, at most: every token trained, every row one document."""
    import numpy as np

    from posttrain_lib.training.flops import FlopCount, causal_pairs

    train = config.train
    count = FlopCount.of(spec, config.model.lora)
    rows = np.full(train.rows_per_step, train.row_tokens)
    tokens = float(rows.sum())
    pairs = sum(flops.model * causal_pairs(rows, window) for window, flops in count.pairs.items())
    return (count.token.model + count.supervised.model) * tokens + pairs


def _warnings(config: RunConfig, layout: Layout) -> tuple[str, ...]:
    mesh, each = layout.mesh, config.compute.devices_per_node
    found = []
    if config.compute.nodes > 1 and mesh.tensor > each:
        found.append(
            f"tensor {mesh.tensor} reaches beyond a node of {each}: its sums wait for the network in each layer"
        )
    if config.compute.nodes > 1 and mesh.tensor * mesh.context > each >= mesh.tensor and mesh.context > 1:
        found.append(f"context {mesh.context} reaches beyond a node: keys and values cross the network in each layer")
    if layout.micro_batches > 1 and layout.weight_ranks * mesh.replicate > 1:
        found.append(f"{layout.micro_batches} micro-batches a step: gradients are kept whole until the last of them")
    return tuple(found)


def plan_lines(plan: LaunchPlan, *, short: bool = False) -> list[str]:
    """For the terminal; ``short``: as the train step says it."""
    total, mesh = plan.total_bytes, plan.mesh
    degrees = " x ".join(f"{name} {getattr(mesh, name)}" for name in AXES if name != "expert")
    have = "" if plan.device_bytes is None else f" of {size(plan.device_bytes)}"
    lines = [
        f"  mesh       {mesh.world} device(s) on {plan.nodes} node(s): {degrees}"
        + (f", expert {mesh.expert}" if mesh.expert > 1 else "")
    ]
    if not short:
        lines += [
            f"             {name} {getattr(mesh, name)}: {what}"
            for name, what in AXES.items()
            if getattr(mesh, name) > 1
        ]
    lines.append(f"  memory     about {size(total)}{have} a device ({plan.device})")
    kinds = sorted(plan.memory_bytes.items(), key=lambda item: -item[1]) if short else plan.memory_bytes.items()
    shown = [(kind, count) for kind, count in kinds if count > 0.001 * total]
    if short:
        lines[-1] += ": " + ", ".join(f"{kind} {size(count)}" for kind, count in shown[:4])
    else:
        lines += [f"             {size(count):>10}  {kind}: {KINDS[kind]}" for kind, count in shown]
        if plan.host_bytes:
            of = "" if plan.host_memory_bytes is None else f", of {size(plan.host_memory_bytes)}"
            node = f"in each node's memory{of}"
            lines.append(f"             {size(plan.host_bytes):>10}  {node}: offloaded shares")
        lines += [f"             or {item.described()}" for item in plan.alternatives[:6]]
    lines.append(_step_line(plan))
    return lines + [f"  warning    {text}" for text in plan.warnings]


def _step_line(plan: LaunchPlan) -> str:
    text = (
        f"  step       {plan.tokens_per_step:,} token slots in {plan.micro_batches} micro-batch(es) a device, at most "
        f"{_operations(plan.flops)}"
    )
    if plan.step_seconds is not None:
        text += f"; {_duration(plan.step_seconds)} at {UTILISATION:.0%} of {plan.device}'s peak"
        if plan.steps is not None:
            text += f", {_duration(plan.steps * plan.step_seconds)} in all"
    return text


def _operations(count: float) -> str:
    """FLOPs, in the unit in which their first digits stand."""
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= factor:
            return f"{count / factor:,.4g} {unit}" if count < 1e4 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def _duration(seconds: float) -> str:
    """A time, in the unit in which its first digits stand."""
    for least, unit in ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= least:
            return f"{seconds / least:,.1f} {unit}"
    return f"{seconds * 1e6:.1f} us"
