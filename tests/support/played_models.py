"""Policy and reference as whoever plays them: a table of bigrams, one rank in this process, two actors of verl's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain_lib.rl.ranks import models_here
from posttrain_lib.schema.mesh import MeshSpec
from posttrain_lib.training.device import reproducible
from tests.oracles.tiny_job import VOCABULARY
from tests.support.policy_jobs import policy_job
from tests.support.table_roles import Table, TablePolicy, TableReference

if TYPE_CHECKING:
    from posttrain_lib.rl.roles import PolicyRole, ReferenceRole
    from posttrain_lib.training.job import TrainJob

    Made = Callable[[TrainJob], AbstractContextManager[tuple[PolicyRole, ReferenceRole]]]


@contextlib.contextmanager
def on_a_table(job: TrainJob) -> Iterator[Any]:
    """Of a model folder that holds a table."""
    assert job.rollouts is not None and job.rollouts.frozen is not None
    frozen = Table.read(Path(job.rollouts.frozen))
    with contextlib.closing(TablePolicy(job)) as policy:
        yield policy, TableReference(frozen, job.train.row_tokens)


@contextlib.contextmanager
def here(job: TrainJob) -> Iterator[Any]:
    """One rank."""
    with (
        reproducible(job.train.seed, job.threads),
        models_here(dataclasses.replace(job, mesh=MeshSpec()), torch.device("cpu"), print) as models,
    ):
        yield models


@contextlib.contextmanager
def on_actors(job: TrainJob) -> Iterator[Any]:
    """As many as the mesh has ranks; Ray is there."""
    from posttrain_lib.adapters.verl_roles import VerlWorkers, verl_models

    with verl_models(VerlWorkers(job, {"CPU": 1}, job.world, private=True)) as models:
        yield models


@dataclass(frozen=True)
class Player:
    """How models of a job are ``made``; jobs are in ``folder``, and ``train`` is what differs in their section."""

    made: Made
    folder: Path
    train: dict[str, Any]

    def job(self, work: str, **train: Any) -> TrainJob:
        """Of two ranks, with a reference; ``work``: its work folder."""
        return policy_job(self.folder, work, mesh=MeshSpec(shard=2), reference=True, **{**self.train, **train})


def player(kind: str, folder: Path) -> Player:
    """``kind``: fake, here, actors. The models are the same for the last two."""
    if kind != "fake":
        return Player(here if kind == "here" else on_actors, folder, {})
    if not (folder / "tables").exists():
        Table.random(VOCABULARY).write(folder / "tables" / "model")
    return Player(on_a_table, folder / "tables", {"optimizer": {"lr": 1.0}})
