"""Signals, hangs and orphans, with real processes: of one process, of local Ray workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from posttrain_lib.compute import ray_launcher
from posttrain_lib.compute.heart import read_pulses
from posttrain_lib.compute.ray_session import RaySession
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.errors import RETRY_EXIT_CODE, PreemptedError
from posttrain_lib.losses.base import Loss
from posttrain_lib.training.job import TrainJob
from posttrain_lib.training.loop import Events
from posttrain_lib.training.pulse import current
from tests.oracles.tiny_job import make_job, tiny_config
from tests.support.launched import Family, command, start, wait_for

LONG = {"steps": 100_000, "evaluate_every_steps": 100_000, "checkpoint": {"every_steps": 50_000}}


def lines(output: Path) -> dict[int, str]:
    """step -> loss of what a started process reported."""
    found = {}
    for line in output.read_text().splitlines():
        words = line.split()
        if len(words) >= 2 and words[0].isdigit():
            found[int(words[0])] = words[1]
    return found


class HangingLoss(Loss):
    """The usual loss, until rank 0's sixth step: then it sleeps, for as long as a file is not there."""

    def __init__(self) -> None:
        from posttrain_lib.losses import build_loss

        self._usual = build_loss("sft", {})

    def divisor(self, batch: object) -> float:
        return self._usual.divisor(batch)

    def __call__(self, model: object, batch: object) -> object:
        marker = Path(os.environ["HANGS_ONCE"])
        if current().step == 6 and not marker.exists():
            marker.touch()  # whoever comes first; the next attempt goes on
            time.sleep(600)
        return self._usual(model, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_one_process_that_is_asked_to_stop_checkpoints_and_goes_on_later(name: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with start(command(tmp_path, {}, LONG), output) as process:
        wait_for(lambda: max(lines(output), default=0) >= 5, 120, "step 5")
        process.send_signal(signal.Signals[name])
        assert process.wait(timeout=60) == RETRY_EXIT_CODE
    text, last = output.read_text(), max(lines(output))
    assert "PreemptedError" in text and f"got {name}" in text
    assert (tmp_path / f"work/checkpoints/step-{last:08d}").is_dir()
    again = tmp_path / "again"
    with start(command(tmp_path, {}, LONG), again) as process:
        wait_for(lambda: max(lines(again), default=0) >= last + 3, 120, "three more steps")
        process.kill()
    assert min(lines(again)) == last, "it went on from the step that it had stopped behind"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["driver", "rank"])
def test_ray_workers_stop_together_whoever_is_asked(to: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with start(command(tmp_path, {"devices_per_node": 2}, LONG), output) as process:
        wait_for(lambda: max(lines(output), default=0) >= 5, 200, "step 5")
        family = Family(process.pid)
        asked = process.pid if to == "driver" else read_pulses(tmp_path / "work")[1]["pid"]
        os.kill(asked, signal.SIGTERM)
        assert process.wait(timeout=60) == RETRY_EXIT_CODE, output.read_text()
    assert "PreemptedError" in output.read_text()
    assert len(list((tmp_path / "work/checkpoints").glob("step-*"))) == 1
    wait_for(lambda: not family.alive(), 180, "the end of all processes")


@pytest.mark.slow
def test_a_stop_that_is_asked_for_before_the_ranks_are_there_is_heard_by_them(tmp_path: Path) -> None:
    """A machine may be taken back while a lost worker is being replaced."""

    def asked(
        job: TrainJob, compute: ComputeConfig, session: RaySession, unit: dict[str, float], after_loss: bool
    ) -> Events:
        os.kill(os.getpid(), signal.SIGTERM)
        return (yield from ray_launcher._run_once(job, compute, session, unit, after_loss))

    job, compute = make_job(tmp_path, tiny_config(**LONG)), ComputeConfig(launcher="ray", device="cpu")
    with pytest.raises(PreemptedError, match="stopped after step") as stopped:
        for report in ray_launcher.launch_on_ray(job, compute, asked):
            assert report.step < 50, "nobody heard of it"
    assert stopped.value.got == "the driver got SIGTERM"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hung_rank_is_named_and_the_job_goes_on(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS_ONCE", str(tmp_path / "hung"))
    train = {
        "steps": 10,
        "evaluate_every_steps": 10,
        "checkpoint": {"every_steps": 2},
        "loss": "tests.distributed.test_launch_faults:HangingLoss",
    }
    compute = {"devices_per_node": workers, "hang_seconds": 40, "retries": 1}
    output = tmp_path / "output"
    with start(command(tmp_path, compute, train), output) as process:
        code = process.wait(timeout=280)
    text = output.read_text()
    assert "no rank has moved for" in text and "step 6, training step" in text, text
    assert "test_launch_faults.py" in text and "in __call__" in text, "the stack says where"
    if workers == 1:  # the driver is the rank: it ends, and the next start goes on
        assert code == RETRY_EXIT_CODE
        with start(command(tmp_path, compute, train), output) as process:
            code = process.wait(timeout=200)
    assert code == 0, output.read_text()
    assert max(lines(output)) == 10


@pytest.mark.slow
def test_tokenising_processes_end_with_a_killed_trainer(tmp_path: Path) -> None:
    """Of a rank that SIGKILL takes: its spawned workers notice by themselves."""
    program = (
        "import os, time\n"
        "from posttrain_lib.data.workers import OrderedPool\n"
        "pool = OrderedPool(2, dict, (), len, str)\n"
        "pool.warm(wait=True)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    script = tmp_path / "tokenising.py"
    script.write_text("if __name__ == '__main__':\n    " + program.replace("\n", "\n    "))
    output = tmp_path / "output"
    with start([sys.executable, str(script)], output) as process:
        wait_for(lambda: "ready" in output.read_text(), 120, "the pool")
        family = Family(process.pid)
        assert len(family.alive()) >= 3
        process.kill()
    wait_for(lambda: not family.alive(), 180, "the end of the pool's processes")
