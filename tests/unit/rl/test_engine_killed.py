"""A run whose vLLM is killed within it: it ends by name, and the next one goes on where the checkpoint stands."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.adapters import vllm_process
from posttrain_lib.compute.processes import descendants
from posttrain_lib.errors import RolloutError
from posttrain_lib.rl.ledger import FATES, LEDGER
from posttrain_lib.rl.run import ANSWERS, train_on_rollouts
from posttrain_lib.rl.version_log import read_log
from posttrain_lib.training import pulse
from tests.support.ledgers import trained_visits
from tests.support.rollout_jobs import rollout_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not vllm_process.is_available(), reason="vLLM is not installed"),
]


@pytest.fixture(autouse=True)
def _fresh_pulse() -> Iterator[None]:
    pulse.begin()
    yield
    pulse.begin()


def engine_processes() -> list[int]:
    """Processes below this one that are vLLM's."""
    found = []
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            found += [pid] if b"posttrain_lib.adapters.vllm_worker" in words else []
    return found


def test_a_killed_engine_ends_the_run_by_name_and_the_next_goes_on(tmp_path: Path) -> None:
    """Killed behind update 5, one after the checkpoint, whatever the engine does then."""
    rollouts: dict[str, Any] = {"engine": "vllm", "engine_options": {"options": {"block_size": 32}}}
    job = rollout_job(tmp_path, rollouts=rollouts)
    assert job.rollouts is not None
    events = train_on_rollouts(job, job.rollouts)
    for report in events:
        if report.step == 5:
            break
    (engine,) = engine_processes()
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(RolloutError, match="rollout engine's process does not answer any more") as told:
        list(events)
    assert told.value.where == f"process {engine}" and "exit code -9" in str(told.value)
    assert engine_processes() == []
    pulse.begin()
    again = list(train_on_rollouts(job, job.rollouts))
    assert (again[0].step, again[0].event) == (4, "resumed")
    assert [report.step for report in again[1:]] == [5, 6] and "finished" in again[-1].event
    lines = read_log(tmp_path / "work" / LEDGER)
    assert [line["version"] for line in lines] == list(range(1, 7))
    settled = sorted(visit[0] for line in lines for fate in FATES for visit in line[fate])
    assert settled == sorted(trained_visits(lines)) == list(range(24))
    assert [line["version"] for line in read_log(tmp_path / "work" / ANSWERS)] == sorted([*range(1, 7)] * 9)
    assert engine_processes() == []
