"""A job of rollouts on Ray: the controller and the engine in the driver, the models on actors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain_lib.adapters.verl_roles import VerlPolicy, VerlReference, VerlWorkers, verl_models
from posttrain_lib.compute.heart import DRIVER, Heart, OwnWatch, write_driver_pulse
from posttrain_lib.compute.memory import memory_errors
from posttrain_lib.rl.run import train_on_rollouts
from posttrain_lib.training import pulse

if TYPE_CHECKING:
    import torch

    from posttrain_lib.compute.ray_session import RaySession
    from posttrain_lib.config.compute import ComputeConfig
    from posttrain_lib.training.job import TrainJob
    from posttrain_lib.training.loop import Events


def run_rollouts(
    job: TrainJob, compute: ComputeConfig, session: RaySession, unit: dict[str, float], after_loss: bool
) -> Events:
    """One attempt (``compute.ray_launcher.Attempt``); after a loss it goes on from the last checkpoint by itself.

    Raises:
        WorkerLostError: a rank died. PosttrainError: what a role raised.
    """
    work = Path(job.work_dir)
    write_driver_pulse(work)

    @contextlib.contextmanager
    def on_actors(
        job: TrainJob, device: torch.device, say: Callable[[str], None]
    ) -> Iterator[tuple[VerlPolicy, VerlReference | None]]:
        pulse.beat("actors")
        workers = VerlWorkers(job, unit, compute.devices_per_node, private=session.private)
        session.record()
        with verl_models(workers) as models:
            yield models

    assert job.rollouts is not None, "a job of rollouts"
    with (
        Heart(work, DRIVER, job.world + 1),
        OwnWatch(work, compute.hang_seconds),
        memory_errors(job),
    ):
        return (yield from train_on_rollouts(job, job.rollouts, on_actors))
