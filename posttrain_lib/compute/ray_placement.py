"""Where the ranks run: one actor for each device, node by node, so that neighbours in the mesh share a machine."""

from __future__ import annotations

import dataclasses
import math
import socket
import time
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from posttrain_lib.compute.elastic import smaller_mesh
from posttrain_lib.errors import ConfigError, TrainingError
from posttrain_lib.training.job import TrainJob

#: how long a job may wait for its devices; a cluster may have to start machines for them
START_SECONDS = 900.0
#: after a loss, how long to wait for all devices to come back before fewer are taken
REPLACE_SECONDS = 60.0


def unit_of(job: TrainJob) -> dict[str, float]:
    """What Ray reserves for a rank: a core, and a GPU where the job uses them.

    Raises:
        ConfigError: the job asks for GPUs and Ray has fewer than ranks.
    """
    if job.device == "cpu":
        return {"CPU": 1}
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus >= job.world:
        return {"CPU": 1, "GPU": 1}
    if job.device == "cuda":
        raise ConfigError(
            "Ray has fewer GPUs than the job has workers",
            where="compute.devices_per_node",
            got=f"{job.world} workers",
            expected=f"at most {gpus:g}",
            fix="lower compute.devices_per_node, or give Ray more GPUs",
        )
    return {"CPU": 1}


def free_address(*, private: bool) -> str:
    """A free ``host:port`` of this actor's node, for rank 0 to listen on; loopback if all ranks are on one."""
    host = "127.0.0.1" if private else ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


class Placement:
    """Room for the ranks of a job on a cluster: a bundle for each node, all on different ones."""

    def __init__(self, job: TrainJob, unit: dict[str, float], per_node: int) -> None:
        full, rest = divmod(job.world, per_node)
        self._sizes = [per_node] * full + ([rest] if rest else [])
        self._per_node, self._unit = per_node, unit
        bundles = [{name: size * amount for name, amount in unit.items()} for size in self._sizes]
        self._group: PlacementGroup = placement_group(bundles, strategy="STRICT_SPREAD")

    def is_ready(self, seconds: float) -> bool:
        """Whether the room is there, at the latest ``seconds`` from now."""
        return bool(self._group.wait(seconds))

    def refusal(self) -> TrainingError:
        """To be raised when the room does not come."""
        return TrainingError(
            "the cluster has no room for the job",
            where=f"{len(self._sizes)} nodes with {self._per_node} x {self._unit} each",
            got=f"{ray.available_resources()} free",
            fix="wait for the cluster to be free, ask for fewer nodes, or set compute.min_devices",
        )

    def options(self, rank: int) -> dict[str, Any]:
        """Options of the actor of ``rank``."""
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank // self._per_node)
        return {**actor_resources(self._unit), "scheduling_strategy": strategy}

    def give_back(self) -> None:
        """Free the room, with all that runs in it."""
        if ray.is_initialized():
            remove_placement_group(self._group)


def actor_resources(unit: dict[str, float]) -> dict[str, float]:
    """As an actor's options spell it."""
    return {"num_cpus": unit["CPU"], "num_gpus": unit.get("GPU", 0)}


def devices_alive(unit: dict[str, float], per_node: int) -> int:
    """Devices that the cluster's living nodes have for this job, used or not."""
    kind = "GPU" if "GPU" in unit else "CPU"
    nodes = [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]
    return sum(min(per_node, int(has)) for has in nodes)


def place(job: TrainJob, unit: dict[str, float], per_node: int, least: int | None) -> tuple[Placement, TrainJob]:
    """Wait for room on the cluster; with ``least``, settle for fewer devices where the rest does not come back.

    A node that is gone counts as alive for as long as its heartbeats are waited for, and a new one may be on its way:
    so the whole job is asked for first, and what is missing must be missing for a while.

    Returns:
        The room, and the job as it fits in there, on a smaller mesh or as it was.

    Raises:
        TrainingError: no room in time; or what is left cannot run the job, or is below ``least``.
    """
    placement = Placement(job, unit, per_node)
    deadline, missing_since = time.monotonic() + START_SECONDS, math.inf
    try:
        while not placement.is_ready(1.0):
            now, there = time.monotonic(), devices_alive(unit, per_node)
            missing_since = min(missing_since, now) if there < job.world else math.inf
            if least is not None and now - missing_since > REPLACE_SECONDS:
                placement.give_back()
                return place(_shrunk(job, there, least), unit, per_node, None)
            if now > deadline:
                raise placement.refusal()
    except BaseException:  # an interrupt too: room that is not given back stays taken
        placement.give_back()
        raise
    return placement, job


def _shrunk(job: TrainJob, there: int, least: int) -> TrainJob:
    train = job.train
    mesh = smaller_mesh(
        job.mesh, there, least=least, rows_per_step=train.rows_per_step, micro_batch_rows=train.micro_batch_rows
    )
    if mesh is None:
        raise TrainingError(
            "the cluster has lost devices, and what is left cannot run the job",
            where="compute.min_devices",
            got=f"{there} devices",
            expected=f"at least {least} whose replicate x shard x micro_batch_rows ({train.micro_batch_rows}) divides "
            f"rows_per_step ({train.rows_per_step}), with {job.mesh.context * job.mesh.tensor} devices a group",
            fix="bring nodes back and run again: it goes on from the last checkpoint",
        )
    print(
        f"{there} of {job.world} devices are left: going on with {mesh.world} "
        f"(replicate {job.mesh.replicate} -> {mesh.replicate}, shard {job.mesh.shard} -> {mesh.shard})",
        flush=True,
    )
    return dataclasses.replace(job, mesh=mesh)
