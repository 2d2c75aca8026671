"""The controller's threads: the policy works in one and the engine in another, which stands still for a push."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_lib.rl.engine.embedded import EmbeddedEngine
from posttrain_lib.rl.ranks import models_here
from posttrain_lib.rl.reference import FrozenReference
from posttrain_lib.rl.run import train_on_rollouts
from posttrain_lib.training.job import TrainJob
from tests.support.rollout_jobs import rollout_job

#: what the controller asks of a policy while it runs
ASKED = ("resume", "update", "logprobs", "weights", "save")


class Threads:
    """Which threads each method ran in, by its name."""

    def __init__(self) -> None:
        self.by_method: dict[str, set[int]] = defaultdict(set)

    def noted(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, which tells where it ran; of an iterator, where each item was made."""

        def asked(*args: Any, **options: Any) -> Any:
            self.by_method[name].add(threading.get_ident())
            found = work(*args, **options)
            return self._each(name, found) if isinstance(found, Iterator) else found

        return asked

    def _each(self, name: str, found: Iterator[Any]) -> Iterator[Any]:
        for one in found:
            self.by_method[name].add(threading.get_ident())
            yield one


@pytest.mark.parametrize("staleness", [0, 1])
def test_all_that_is_asked_of_the_policy_runs_in_one_thread_pushes_too_and_the_engine_in_another(
    tmp_path: Path, staleness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policys, engines = Threads(), Threads()

    @contextlib.contextmanager
    def models(job: TrainJob, device: torch.device, say: Callable[[str], None]) -> Iterator[Any]:
        with models_here(job, device, say) as (policy, frozen):
            for name in ASKED:
                monkeypatch.setattr(policy, name, policys.noted(name, getattr(policy, name)))
            assert isinstance(frozen, FrozenReference)
            monkeypatch.setattr(frozen, "logprobs", policys.noted("reference", frozen.logprobs))
            yield policy, frozen

    for name in ("submit", "step", "push", "logprobs", "sleep", "wake"):
        monkeypatch.setattr(EmbeddedEngine, name, engines.noted(name, getattr(EmbeddedEngine, name)))
    parts: dict[str, Any] = {
        "train": {"loss_options": {"kl_weight": 0.1}},
        "rollouts": {"reference": str(tmp_path / "model")},
        "placement": "split" if staleness else "colocated",
    }
    changes = {"updates": 4, "updates_per_batch": 2, "needs_old": True, "max_staleness": staleness}
    job = rollout_job(tmp_path, **parts, **changes)
    assert job.rollouts is not None
    list(train_on_rollouts(job, job.rollouts, models))
    assert policys.by_method.keys() == {*ASKED, "reference"}
    pushing = {name: engines.by_method.pop(name) for name in ("push", "logprobs")}
    policy, engine = (set.union(*threads.by_method.values()) for threads in (policys, engines))
    told = f"{dict(policys.by_method)} {dict(engines.by_method)} {pushing}"
    assert len(policy) == len(engine) == 1 and policy != engine, told
    assert all(idents == policy for idents in pushing.values()), told
