"""What a run will do and need, before anything starts: mesh, memory of a device, tokens, FLOPs, time.

Made from the run's config and the model's spec alone, so that a run over hundreds of devices can be planned on a
laptop. What is an assumption says so.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from posttrain_lib.compute.plan_memory import KINDS, Layout, host_bytes, memory
from posttrain_lib.config import RunConfig
from posttrain_lib.errors import ConfigError
from posttrain_lib.models.spec import ModelSpec
from posttrain_lib.models.vocabulary import with_padded_vocabulary
from posttrain_lib.schema.mesh import MeshSpec

GIB = 2**30
#: share of a GPU's peak that the time is stated at
UTILISATION = 0.4
#: name -> GiB of memory, by the makers' data sheets (decimal gigabytes there are taken as what CUDA reports, about 2 %
#: less than that many GiB)
DEVICE_GIB = {
    "GB200": 186, "B200": 180, "H200": 141, "H100": 80, "A100": 80, "A100-40": 40, "L40S": 48, "A10": 24,
    "RTX 4090": 24, "MI300X": 192,
}  # fmt: skip
_REPORTED = 0.98
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
class Alternative:
    """One change of the config, and the bytes of a device with it."""

    change: str
    total_bytes: int


@dataclass(frozen=True)
class LaunchPlan:
    """The plan of a training job. ``memory_bytes``: of one device, by kind; ``device_bytes`` what one has, None where
    that is not known, and ``device`` what it is. ``flops`` of a step at most, with every token trained and every row
    one document. ``alternatives``: what would lower memory, the most first."""

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
    warnings: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        """Of one device."""
        return sum(self.memory_bytes.values())

    @property
    def fits(self) -> bool | None:
        """Whether a device has as much; None where its memory is not known."""
        return None if self.device_bytes is None else self.total_bytes <= self.device_bytes

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


def make_plan(spec: ModelSpec, config: RunConfig) -> LaunchPlan:
    """The plan of a run with a model of our own definition.

    Raises:
        PlanError: the mesh does not fit the model.
    """
    spec = with_padded_vocabulary(spec, config.model.pad_vocabulary_to)
    check_mesh(spec, config)
    layout = layout_of(config)
    found = memory(spec, layout)
    device, device_bytes = _device(config)
    total = sum(found.values())
    train, compute = config.train, config.compute
    plan = LaunchPlan(
        mesh=layout.mesh,
        nodes=compute.nodes,
        devices_per_node=compute.devices_per_node,
        memory_bytes=found,
        host_bytes=host_bytes(spec, layout) * compute.devices_per_node,
        device=device,
        device_bytes=device_bytes,
        tokens_per_step=train.rows_per_step * train.row_tokens,
        micro_batches=layout.micro_batches,
        steps=train.steps,
        flops=_flops(spec, config),
        peak_flops=_peak(compute.gpu, train.precision),
        warnings=_warnings(config, layout),
    )
    if device_bytes is not None and total > 0.9 * device_bytes:
        plan = dataclasses.replace(plan, alternatives=_alternatives(spec, config, layout, total))
    return plan


def refuse_what_does_not_fit(plan: LaunchPlan) -> None:
    """Stop before a launch that would run out of memory.

    Raises:
        PlanError: naming the largest kinds and what to change, the most effective first.
    """
    if plan.fits is not False:
        return
    assert plan.device_bytes is not None
    largest = sorted(plan.memory_bytes.items(), key=lambda item: -item[1])[:4]
    changes = [f"{item.change}: {item.total_bytes / GIB:.1f} GiB" for item in plan.alternatives]
    raise PlanError(
        f"a device would need {plan.total_bytes / GIB:.1f} GiB and has {plan.device_bytes / GIB:.1f}",
        where="compute, train",
        got="; ".join(f"{kind} {size / GIB:.1f} GiB" for kind, size in largest),
        expected=f"at most {plan.device_bytes / GIB:.1f} GiB ({plan.device})",
        fix=("; ".join(changes) if changes else "use more devices, or larger ones")
        + ". compute.device_memory_gib says what a device has, where the plan is wrong about it",
    )


def layout_of(config: RunConfig) -> Layout:
    """How a config lays a model over its devices."""
    train, compute, lora = config.train, config.compute, config.model.lora
    return Layout(
        mesh=compute.mesh_spec(),
        row_tokens=train.row_tokens,
        rows_per_step=train.rows_per_step,
        micro_batch_rows=train.micro_batch_rows,
        recomputation=train.activation_checkpointing,
        precision=train.precision,
        moments=_moments(config),
        lora=lora,
        base_bytes=2 if lora is not None and lora.base_dtype == "bfloat16" else 4,
        offload=compute.offload == "parameters",
        cuda=_on_cuda(config),
        emulated=not _on_cuda(config) and _emulates(),
    )


def _moments(config: RunConfig) -> int:
    """Float32 tensors of a parameter's size; of optimisers that are not ours, as many as AdamW's are assumed."""
    optimizer = config.train.optimizer
    if optimizer.name == "sgd":
        return 1 if optimizer.options.get("momentum") else 0
    return 3 if optimizer.options.get("amsgrad") else 2


def _on_cuda(config: RunConfig) -> bool:
    if config.compute.device != "auto" or config.compute.gpu is not None:
        return config.compute.device != "cpu"
    import torch

    return torch.cuda.is_available()


def _emulates() -> bool:
    import torch

    from posttrain_lib.ops.attention import has_arithmetic

    return not has_arithmetic(torch.device("cpu"), torch.bfloat16)


def _device(config: RunConfig) -> tuple[str, int | None]:
    """(what the device is, its bytes or None): as configured, by its name, or this machine's own."""
    compute = config.compute
    if compute.device_memory_gib is not None:
        return compute.gpu or "compute.device_memory_gib", int(compute.device_memory_gib * GIB)
    if compute.gpu is not None:
        return compute.gpu, int(DEVICE_GIB[compute.gpu] * GIB * _REPORTED)
    if compute.address is not None or compute.nodes > 1:
        return "not known: compute.gpu or compute.device_memory_gib names it", None
    if _on_cuda(config):
        import torch

        if not torch.cuda.is_available():
            return "a GPU that is not here", None
        return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    from posttrain_lib.checkpoint.verify import free_memory_bytes

    return f"this machine's free memory / {compute.devices_per_node}", free_memory_bytes() // compute.devices_per_node


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


def check_mesh(spec: ModelSpec, config: RunConfig) -> None:
    """The mesh's degrees against the model: what each axis would refuse when the ranks build the model.

    Raises:
        ConfigError: naming the degree, and what it does not fit.
    """
    from posttrain_lib.parallel.context import check_context
    from posttrain_lib.parallel.experts import check_experts
    from posttrain_lib.parallel.tensor import check_tensor

    mesh = config.compute.mesh_spec()
    check_tensor(spec.config, mesh.tensor)
    check_experts(spec.config, mesh.expert)
    check_context(spec.config, mesh.context, row_tokens=config.train.row_tokens, longest=config.data.max_example_tokens)


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


def _alternatives(spec: ModelSpec, config: RunConfig, layout: Layout, total: int) -> tuple[Alternative, ...]:
    """Single changes that need less than ``total`` bytes, the least first."""
    mesh, change = layout.mesh, dataclasses.replace
    tried: dict[str, Layout] = {}
    for mode in ("selective", "full"):
        if mode != layout.recomputation and layout.recomputation != "full":
            tried[f"train.activation_checkpointing: {mode}"] = change(layout, recomputation=mode)
    if layout.micro_batch_rows > 1:
        tried["train.micro_batch_rows: 1"] = change(layout, micro_batch_rows=1)
    if layout.micro_batches > 1:
        rows = mesh.data_degree * layout.micro_batch_rows
        tried[f"train.rows_per_step: {rows} (one micro-batch)"] = change(layout, rows_per_step=rows)
    if mesh.replicate > 1:
        wider = change(mesh, replicate=1, shard=mesh.shard * mesh.replicate)
        tried[f"compute.mesh: replicate 1, shard {wider.shard}"] = change(layout, mesh=wider)
    more = change(mesh, shard=2 * mesh.shard)
    rows = max(layout.rows_per_step, more.data_degree * layout.micro_batch_rows)
    tried[f"twice the devices (compute.mesh.shard: {more.shard})"] = change(layout, mesh=more, rows_per_step=rows)
    if layout.precision == "fp32":
        tried["train.precision: bf16"] = change(layout, precision="bf16")
    if not layout.offload and mesh.world > 1:
        tried["compute.offload: parameters"] = change(layout, offload=True)
    if layout.lora is None:
        from posttrain_lib.config.model import Lora

        adapters = Lora(base_dtype="bfloat16")
        tried["model.lora: {rank: 16, base_dtype: bfloat16}"] = change(layout, lora=adapters, base_bytes=2)
    if layout.row_tokens > 2 * config.data.max_example_tokens:
        tried[f"train.row_tokens: {layout.row_tokens // 2}"] = change(layout, row_tokens=layout.row_tokens // 2)
    found = [Alternative(text, sum(memory(spec, other).values())) for text, other in tried.items()]
    return tuple(sorted((item for item in found if item.total_bytes < total), key=lambda item: item.total_bytes))


def plan_lines(plan: LaunchPlan, *, short: bool = False) -> list[str]:
    """For the terminal; ``short``: as the train step says it."""
    total, mesh = plan.total_bytes, plan.mesh
    degrees = " x ".join(f"{name} {getattr(mesh, name)}" for name in AXES if name != "expert")
    have = "" if plan.device_bytes is None else f" of {_size(plan.device_bytes)}"
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
    lines.append(f"  memory     about {_size(total)}{have} a device ({plan.device})")
    kinds = sorted(plan.memory_bytes.items(), key=lambda item: -item[1]) if short else plan.memory_bytes.items()
    shown = [(kind, size) for kind, size in kinds if size > 0.001 * total]
    if short:
        lines[-1] += ": " + ", ".join(f"{kind} {_size(size)}" for kind, size in shown[:4])
    else:
        lines += [f"             {_size(size):>10}  {kind}: {KINDS[kind]}" for kind, size in shown]
        if plan.host_bytes:
            lines.append(f"             {_size(plan.host_bytes):>10}  in each node's memory: offloaded shares")
        lines += [f"             or {_size(item.total_bytes)} with {item.change}" for item in plan.alternatives[:6]]
    lines.append(_step_line(plan))
    return lines + [f"  warning    {text}" for text in plan.warnings]


def _step_line(plan: LaunchPlan) -> str:
    text = (
        f"  step       {plan.tokens_per_step:,} token slots in {plan.micro_batches} micro-batch(es) a device, at most "
        f"{plan.flops / 1e12:,.3g} TFLOP"
    )
    if plan.step_seconds is not None:
        text += f"; {plan.step_seconds:,.2f} s at {UTILISATION:.0%} of {plan.device}'s peak"
        if plan.steps is not None:
            text += f", {plan.steps * plan.step_seconds / 3600:,.1f} h in all"
    return text


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
