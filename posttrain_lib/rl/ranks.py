"""One rank of the roles that are models, as it is in whatever process runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from posttrain_lib.parallel.process_group import process_group
from posttrain_lib.rl.policy import PolicyRank
from posttrain_lib.rl.reference import FrozenReference
from posttrain_lib.training.companions import load_frozen

if TYPE_CHECKING:
    import torch

    from posttrain_lib.rl.roles import PolicyRole, ReferenceRole
    from posttrain_lib.training.job import TrainJob

#: (job, device, what to do with a note) -> the policy and the frozen model, if the job has one, while inside
Models = Callable[
    ["TrainJob", "torch.device", Callable[[str], None]],
    AbstractContextManager["tuple[PolicyRole, ReferenceRole | None]"],
]


@contextlib.contextmanager
def models_here(
    job: TrainJob, device: torch.device, say: Callable[[str], None]
) -> Iterator[tuple[PolicyRank, FrozenReference | None]]:
    """Rank ``job.rank`` of the policy, and of the frozen model over the same mesh; given up at the end.

    Raises:
        ConfigError, ModelError: see :class:`rl.policy.PolicyRank`.
    """
    rollouts = job.rollouts
    assert rollouts is not None, "a job of rollouts"
    with process_group(job.rank, job.world, job.rendezvous, device):
        policy = PolicyRank(
            job, device, most_mismatch=rollouts.max_mismatch, trajectory=dict(rollouts.trajectory), say=say
        )
        with contextlib.closing(policy):
            frozen = None
            if rollouts.frozen is not None:
                model = load_frozen(job, policy.mesh, rollouts.frozen)
                frozen = FrozenReference(model, policy.mesh, policy.scoring)
            yield policy, frozen
