"""What learns on a rank of a job, whoever says when: a loader's loop, or a controller of rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain_lib.checkpoint.adapters import adapters_trajectory
from posttrain_lib.checkpoint.manager import CheckpointManager
from posttrain_lib.models.hf_spec import HFSpec
from posttrain_lib.models.lora import LoraDecoder
from posttrain_lib.optim import build_optimizer
from posttrain_lib.training.incidents import LOG, IncidentPolicy
from posttrain_lib.training.metrics import StepMeter
from posttrain_lib.training.state import Position, TrainState, trajectory_of

if TYPE_CHECKING:
    import torch

    from posttrain_lib.models.decoder import Decoder
    from posttrain_lib.models.spec import ModelSpec
    from posttrain_lib.training.job import TrainJob


class Learner(NamedTuple):
    """What a checkpoint holds, what measures the steps, where checkpoints go, and what follows of a step gone wrong."""

    state: TrainState
    meter: StepMeter
    checkpoints: CheckpointManager
    incidents: IncidentPolicy


def make_learner(
    job: TrainJob,
    spec: ModelSpec | HFSpec,
    model: Decoder,
    position: Position,
    device: torch.device,
    *,
    say: Callable[[str], None],
    frozen: ModelSpec | HFSpec | None = None,
    trajectory: Mapping[str, Any] | None = None,
) -> Learner:
    """The learner of this rank; all ranks make one at the same time.

    Args:
        model: of ``spec``, laid over the ranks. position: where the data stands. device: this rank's.
        say: called with what of old checkpoints a person should know.
        frozen: the model that runs beside the trained one in every step, if any.
        trajectory: what the weights depend on besides the train section, adapters and backend; JSON-ready.
    """
    config = job.train
    kept = trajectory_of(config)
    if isinstance(model, LoraDecoder):
        kept.update(adapters_trajectory(model))
    if isinstance(spec, HFSpec):
        kept.update(backend="hf")
    state = TrainState(model, build_optimizer(model, config.optimizer), position, kept | dict(trajectory or {}))
    checkpoints = CheckpointManager(
        job.checkpoint_folder,
        config.checkpoint.keep_last,
        job.rank,
        say=say,
        keep_every_steps=config.checkpoint.keep_every_steps,
        asynchronous=config.checkpoint.asynchronous,
        layout=dataclasses.asdict(job.mesh),
    )
    incidents = IncidentPolicy(config.incidents, Path(job.work_dir) / LOG, writes=job.rank == 0)
    return Learner(state, StepMeter(job, spec, model, state.optimizer, device, frozen), checkpoints, incidents)
