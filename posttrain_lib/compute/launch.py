"""``launch(job, compute)``: an iterator of step reports, wherever the ranks run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain_lib.compute.heart import OwnWatch, clear
from posttrain_lib.compute.processes import remove_orphans
from posttrain_lib.compute.rank import run_rank
from posttrain_lib.errors import ConfigError

if TYPE_CHECKING:
    from posttrain_lib.config.compute import ComputeConfig
    from posttrain_lib.training.job import TrainJob
    from posttrain_lib.training.loop import Events

#: what torchrun sets for each process that it starts
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def launch(job: TrainJob, compute: ComputeConfig) -> Events:
    """Run ``job`` as the compute section says; yields reports, returns the result.

    Raises:
        TrainingError: a worker was lost more often than ``compute.retries`` allows, or the training itself failed.
        PreemptedError: a signal asked for a stop; a checkpoint is written and the same job goes on from it.
        ConfigError: the launcher cannot give the devices asked for.
    """
    launcher = launcher_of(compute)
    job = dataclasses.replace(
        job,
        device=compute.device,
        mesh=compute.mesh_spec(),
        offload=compute.offload,
        threads=threads_per_worker(compute),
        loader_workers=compute.loader_workers,
    )
    if launcher == "torchrun" and job.rollouts is not None:
        raise ConfigError(
            "rollouts are driven from one process, and torchrun gives each rank a loop of its own",
            where="compute.launcher",
            got="torchrun",
            fix="start the step without torchrun; several devices then run on Ray",
        )
    if launcher == "torchrun":
        if not under_torchrun():
            raise ConfigError(
                "this process was not started by torchrun",
                where="compute.launcher",
                got="torchrun",
                fix=f"start it with torchrun --nproc-per-node {compute.devices_per_node} -m steps.train ..., or leave "
                "compute.launcher out",
            )
        from posttrain_lib.compute.torchrun import lead

        return (yield from lead(job, compute))
    if launcher == "in_process":
        work = Path(job.work_dir)
        remove_orphans(work)
        clear(work)
        with OwnWatch(work, compute.hang_seconds):
            return (yield from run_rank(job, compute.stop_signals))
    if compute.nodes > 1 and compute.address is None:
        raise ConfigError(
            "several nodes need a Ray cluster that they belong to",
            where="compute.nodes",
            got=compute.nodes,
            fix="name it in compute.address (host:port, ray://host:port, or auto), or start the step with torchrun",
        )
    from posttrain_lib.compute.ray_launcher import launch_on_ray

    if job.rollouts is not None:
        from posttrain_lib.adapters.verl_launch import run_rollouts

        return (yield from launch_on_ray(job, compute, run_rollouts))
    return (yield from launch_on_ray(job, compute))


def launcher_of(compute: ComputeConfig) -> str:
    """The launcher itself where ``compute.launcher`` is "auto".

    One device without a cluster needs no Ray, which takes seconds to start and 600 MB.
    """
    if compute.launcher != "auto":
        return compute.launcher
    if under_torchrun():
        return "torchrun"
    return "in_process" if compute.workers == 1 and compute.address is None else "ray"


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in _TORCHRUN)


def threads_per_worker(compute: ComputeConfig) -> int:
    """CPU threads of each worker: as configured, else an equal share of a machine's cores."""
    return compute.threads_per_worker or max(1, len(os.sched_getaffinity(0)) // compute.devices_per_node)
