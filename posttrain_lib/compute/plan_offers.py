"""What to change about a run that does not fit: single changes first, then two or three together.

Every offer is a config that would load, for the same devices unless it says otherwise. What is tried is bounded, so
that a plan stays a matter of less than a second.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain_lib.compute.plan_layout import check_mesh, size
from posttrain_lib.compute.plan_memory import Estimate, Layout
from posttrain_lib.config import RunConfig
from posttrain_lib.config.model import Lora
from posttrain_lib.errors import ConfigError
from posttrain_lib.schema.mesh import MeshSpec

#: changes that are tried together
_MOST_CHANGES = 3
#: other meshes on the same devices that are tried
_MOST_MESHES = 64
#: combinations that are shown
_SHOWN = 3
#: what a change costs the run, to order offers that fit: time, then what alters the training itself, then devices
_COSTS = {"recompute": 2, "mesh": 2, "beyond a node": 2, "precision": 3, "rows": 2, "offload": 4}
_OTHER_TRAINING, _MORE_DEVICES = 10, 12


@dataclass(frozen=True)
class Budget:
    """Bytes of a device and of a node's own memory; None where that is not known."""

    device_bytes: int | None
    host_bytes: int | None

    def holds(self, total: int, host: int) -> bool:
        """Whether both are enough, as far as they are known."""
        return (self.device_bytes is None or total <= self.device_bytes) and (
            self.host_bytes is None or host <= self.host_bytes
        )


@dataclass(frozen=True)
class Alternative:
    """Changes of the config, by key, and what a device (and, for offloaded shares, a node) needs with them.

    ``changes``: how many they are, a number of rows that only follows another change not counted.
    ``host_known``: whether what a node has is known, and ``fits`` says something about it.
    """

    settings: dict[str, Any]
    total_bytes: int
    host_bytes: int
    fits: bool
    changes: int = 1
    host_known: bool = True

    @property
    def change(self) -> str:
        """As it is written in a config."""
        return ", ".join(f"{key}: {_written(value)}" for key, value in self.settings.items())

    def __str__(self) -> str:
        return f"{self.change} -> {self._needs()}"

    def described(self) -> str:
        """For the plan's list, the size first."""
        return f"{self._needs()} with {self.change}{' (fits)' if self.fits else ' (does not fit)'}"

    def _needs(self) -> str:
        text = size(self.total_bytes)
        if self.host_bytes:
            text += f" and {size(self.host_bytes)} of each node's memory"
            if not self.host_known:
                text += " (compute.host_memory_gib, for what a node has, is not given)"
        return text


@dataclass(frozen=True)
class _Trial:
    settings: dict[str, Any]
    layout: Layout
    changes: int
    cost: float
    each: int  #: devices of a node


def offers(estimate: Estimate, config: RunConfig, layout: Layout, budget: Budget) -> tuple[Alternative, ...]:
    """Changes that fit, the cheapest first, then single ones that need less than now, the least first. Two or three
    together are there where no single one fits; where those do not either, the closest of all comes first."""
    trials = [*_single_trials(config, layout), *_trials(estimate, config, layout)]
    now = sum(estimate.memory(layout).values())
    fitting, smaller = _measured(estimate, [trial for trial in trials if trial.changes == 1], budget, now)
    single, rest = _accepted(estimate, config, fitting), _accepted(estimate, config, smaller)
    if single:
        return (*single, *rest)
    fitting, smaller_yet = _measured(estimate, [trial for trial in trials if trial.changes > 1], budget, now)
    together = _accepted(estimate, config, fitting, most=_SHOWN)
    if not together:
        closest = sorted((*smaller, *smaller_yet), key=lambda offer: offer.total_bytes)
        together = _accepted(estimate, config, closest, most=1)
    return (*together, *(offer for offer in rest if offer not in together))


def _measured(
    estimate: Estimate, trials: list[_Trial], budget: Budget, now: int
) -> tuple[list[Alternative], list[Alternative]]:
    """(those that fit, by changes and cost; those that do not and need less than ``now``, the least first)."""
    fitting: list[tuple[int, float, int, int, Alternative]] = []
    smaller: list[tuple[int, int, Alternative]] = []
    known = budget.host_bytes is not None
    for trial in trials:
        total, host = sum(estimate.memory(trial.layout).values()), estimate.host_bytes(trial.layout) * trial.each
        offer = Alternative(trial.settings, total, host, budget.holds(total, host), trial.changes, known)
        if offer.fits:
            fitting.append((trial.changes, trial.cost, total, len(fitting), offer))
        elif total < now:
            smaller.append((total, len(smaller), offer))
    return [item[-1] for item in sorted(fitting)], [item[-1] for item in sorted(smaller)]


def _accepted(
    estimate: Estimate, config: RunConfig, offered: list[Alternative], most: int | None = None
) -> list[Alternative]:
    """Those that load as a config; what changes all that an earlier one does, and more, is left out."""
    kept: dict[frozenset[str], Alternative] = {}
    for offer in offered:
        if most is not None and len(kept) == most:
            break
        keys = frozenset(offer.settings)
        if not any(fewer <= keys for fewer in kept) and _loads(estimate, config, offer.settings):
            kept[keys] = offer
    return list(kept.values())


def changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The config with values at dotted keys; raises a ValueError as loading would."""
    raw = config.model_dump(mode="json")
    for key, value in settings.items():
        *sections, name = key.split(".")
        node = raw
        for section in sections:
            node = node[section]
        node[name] = value
    return RunConfig.model_validate(raw)


def _loads(estimate: Estimate, config: RunConfig, settings: dict[str, Any]) -> bool:
    """Whether the changed config is one, and its mesh one that the model can be cut by."""
    try:
        check_mesh(estimate.spec, changed(config, settings))
    except (ValueError, ConfigError):  # as a section and as the model refuse it
        return False
    return True


def _single_trials(config: RunConfig, layout: Layout) -> Iterator[_Trial]:
    """Changes that are tried alone: shorter rows, or more devices."""
    change, each, mesh = dataclasses.replace, config.compute.devices_per_node, layout.mesh
    half = layout.row_tokens // 2
    if half >= config.data.max_example_tokens and half % (2 * mesh.context) == 0:
        yield _Trial({"train.row_tokens": half}, change(layout, row_tokens=half), 1, _OTHER_TRAINING, each)
    nodes = config.compute.nodes
    if not layout.cuda and nodes == 1:
        return  # more processes on one machine share the memory that there is
    more = change(mesh, shard=2 * mesh.shard)
    if nodes == 1 and each < 8:
        settings: dict[str, Any] = {"compute.devices_per_node": 2 * each, "compute.mesh": _degrees(more)}
        each *= 2
    else:
        settings = {"compute.nodes": 2 * nodes, "compute.mesh": _degrees(more)}
    if rows := _rows(layout.rows_per_step, more.data_degree * layout.micro_batch_rows)[:1]:
        if rows[0] != layout.rows_per_step:
            settings["train.rows_per_step"] = rows[0]
        yield _Trial(settings, change(layout, mesh=more, rows_per_step=rows[0]), 1, _MORE_DEVICES, each)


def _trials(estimate: Estimate, config: RunConfig, layout: Layout) -> Iterator[_Trial]:
    """All of one to three changes of those that leave data and devices as they are."""
    nothing: tuple[dict[str, Any], dict[str, Any], int] = ({}, {}, 0)
    recompute = [nothing]
    if layout.recomputation != "full":
        modes = {"none": ("selective", "full"), "selective": ("full",)}[layout.recomputation]
        recompute += [
            ({"train.activation_checkpointing": mode}, {"recomputation": mode}, _COSTS["recompute"] - (mode != "full"))
            for mode in modes
        ]
    micro = [nothing]
    if layout.micro_batch_rows > 1:
        micro.append(({"train.micro_batch_rows": 1}, {"micro_batch_rows": 1}, 1))
    precision = [nothing]
    if layout.precision == "fp32":
        precision.append(({"train.precision": "bf16"}, {"precision": "bf16"}, _COSTS["precision"]))
    offload = [nothing]
    if layout.offload:
        offload.append(({"compute.offload": "none"}, {"offload": False}, 0))
    elif layout.cuda and layout.mesh.world > 1:
        offload.append(({"compute.offload": "parameters"}, {"offload": True}, _COSTS["offload"]))
    adapters = [nothing]
    if layout.lora is None:
        lora = Lora(rank=16, base_dtype="bfloat16")
        own: dict[str, Any] = {"rank": lora.rank, "base_dtype": lora.base_dtype}
        adapters.append(({"model.lora": own}, {"lora": lora, "base_bytes": 2}, _OTHER_TRAINING))
    meshes = [nothing]
    for mesh, cost in _meshes(estimate, config, layout):
        meshes.append(({"compute.mesh": _degrees(mesh)}, {"mesh": mesh}, cost))
    for parts in itertools.product(meshes, recompute, micro, precision, offload, adapters):
        changes = sum(bool(settings) for settings, _, _ in parts)
        if changes > _MOST_CHANGES or (parts[0][0] and parts[-1][0]):  # adapters with other meshes: too many to try
            continue
        settings = {key: value for own, _, _ in parts for key, value in own.items()}
        fields = {key: value for _, own, _ in parts for key, value in own.items()}
        other, cost = dataclasses.replace(layout, **fields), sum(part[2] for part in parts)
        share = other.mesh.data_degree * other.micro_batch_rows
        follows = layout.rows_per_step % share != 0
        for number, rows in enumerate(_rows(layout.rows_per_step, share)):
            named = {} if rows == layout.rows_per_step else {"train.rows_per_step": rows}
            count = changes + (bool(named) and (number > 0 or not follows))
            if 0 < count <= _MOST_CHANGES:
                varied = dataclasses.replace(other, rows_per_step=rows)
                spent = cost + _COSTS["rows"] * abs(math.log2(rows / layout.rows_per_step))
                yield _Trial({**settings, **named}, varied, count, spent, config.compute.devices_per_node)


def _rows(now: int, share: int) -> list[int]:
    """Rows of a step that ``share`` divides: the nearest to now's, and those of a single micro-batch. None that would
    more than double a step."""
    below = now // share * share
    nearest = below if below and now - below <= below + share - now else below + share
    return [rows for rows in dict.fromkeys((nearest, share)) if rows <= 2 * now]


def _meshes(estimate: Estimate, config: RunConfig, layout: Layout) -> list[tuple[MeshSpec, int]]:
    """(mesh, cost) of other meshes on the same devices that the model can be cut by, the cheapest first: one copy of
    the model or as many as now, any tensor degree within a node, any context degree that cuts a row. Degrees far from
    now's cost more: they move more over the network."""
    now, world, compute = layout.mesh, layout.mesh.world, config.compute
    found = []
    tensors = [degree for degree in _divisors(world) if degree <= max(compute.devices_per_node, now.tensor)]
    for tensor, copies in itertools.product(tensors, sorted({1, now.replicate})):
        if world % (tensor * copies) or not _fits_model(estimate, config, MeshSpec(tensor=tensor)):
            continue
        for context in _divisors(world // (tensor * copies)):
            shard = world // (tensor * copies * context)
            if (shard * context) % now.expert:
                continue
            mesh = MeshSpec(replicate=copies, shard=shard, context=context, tensor=tensor, expert=now.expert)
            if mesh != now and _fits_model(estimate, config, MeshSpec(context=context)):
                far = compute.nodes > 1 and tensor * context > compute.devices_per_node
                moved = abs(context.bit_length() - now.context.bit_length())
                moved += abs(tensor.bit_length() - now.tensor.bit_length())
                beyond = _COSTS["beyond a node"] if far and context > now.context else 0
                found.append((mesh, _COSTS["mesh"] + moved + beyond))
    return sorted(found, key=lambda item: (item[1], item[0].replicate))[:_MOST_MESHES]


def _fits_model(estimate: Estimate, config: RunConfig, mesh: MeshSpec) -> bool:
    from posttrain_lib.parallel.context import check_context
    from posttrain_lib.parallel.tensor import check_tensor

    model, longest = estimate.spec.config, config.data.max_example_tokens
    try:
        check_tensor(model, mesh.tensor)
        check_context(model, mesh.context, row_tokens=config.train.row_tokens, longest=longest)
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _degrees(mesh: MeshSpec) -> dict[str, int]:
    """A mesh as a config has it: shard always, of the others what is not the default."""
    return {name: degree for name, degree in vars(mesh).items() if degree > 1 or name == "shard"}


def _written(value: Any) -> str:
    """A value in YAML's short form."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    return str(value)
