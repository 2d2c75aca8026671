"""``launch(job, compute)``: an iterator of step reports, wherever the ranks run."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from posttrain_lib.training.loop import Events, train

if TYPE_CHECKING:
    from posttrain_lib.config.compute import ComputeConfig
    from posttrain_lib.training.job import TrainJob


def launch(job: TrainJob, compute: ComputeConfig) -> Events:
    """Run ``job`` as the compute section says; yields reports, returns the result.

    Raises:
        TrainingError: a worker was lost more often than ``compute.retries`` allows, or the training itself failed.
    """
    job = dataclasses.replace(
        job,
        device=compute.device,
        mesh=compute.mesh_spec(),
        threads=threads_per_worker(compute),
        loader_workers=compute.loader_workers,
    )
    if compute.launcher == "in_process":
        return (yield from train(job))
    from posttrain_lib.compute.ray_launcher import launch_on_ray

    return (yield from launch_on_ray(job, address=compute.address, retries=compute.retries))


def threads_per_worker(compute: ComputeConfig) -> int:
    """CPU threads of each worker: as configured, else an equal share of a machine's cores."""
    return compute.threads_per_worker or max(1, len(os.sched_getaffinity(0)) // compute.devices_per_node)
