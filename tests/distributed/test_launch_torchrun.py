"""The same job under real torchrun: losses, errors, signals, restarts and orphans."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from posttrain_lib.compute.heart import read_pulses
from posttrain_lib.losses.base import Loss
from tests.distributed.test_launch_faults import LONG, lines
from tests.support.launched import Family, command, start, wait_for

pytestmark = pytest.mark.slow
TWO = ["--nproc-per-node", "2"]


class BrokenOnRankOne(Loss):
    """A user's loss with a mistake that shows on the second rank."""

    def divisor(self, batch: object) -> float:
        return 1.0

    def __call__(self, model: object, batch: object) -> object:
        import torch.distributed as dist

        if dist.get_rank() == 1:
            raise ZeroDivisionError("a mistake in a user's loss")
        time.sleep(600)


def test_ranks_of_torchrun_train_as_one_process_does(tmp_path: Path) -> None:
    losses = {}
    for name, compute, torchrun in (("one", {}, []), ("two", {"devices_per_node": 2}, TWO)):
        (tmp_path / name).mkdir()
        output = tmp_path / name / "output"
        with start(command(tmp_path / name, compute, {"steps": 4}, torchrun=torchrun), output) as process:
            assert process.wait(timeout=200) == 0, output.read_text()
        losses[name] = [float.fromhex(loss) for step, loss in sorted(lines(output).items()) if step > 0]
        steps = [line.split()[0] for line in output.read_text().splitlines() if line[:1].isdigit()]
        assert steps == ["0", "1", "2", "3", "4"], "only rank 0 speaks"
    # float32 sums in another order, grown through four updates of Adam
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    assert [path.name for path in (tmp_path / "two/work/logs").iterdir()] == ["rank-1.log"]


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with start(command(tmp_path, {"devices_per_node": 3}, {"rows_per_step": 12}, torchrun=TWO), output) as process:
        assert process.wait(timeout=200) != 0
    assert "torchrun started another number of processes" in output.read_text()


def test_the_failing_ranks_traceback_comes_first(tmp_path: Path) -> None:
    output = tmp_path / "output"
    train = {"steps": 4, "loss": "tests.distributed.test_launch_torchrun:BrokenOnRankOne"}
    with start(command(tmp_path, {"devices_per_node": 2}, train, torchrun=TWO), output) as process:
        assert process.wait(timeout=200) != 0
    log = (tmp_path / "work/logs/rank-1.log").read_text()
    assert "rank 1 | " in log and "ZeroDivisionError: a mistake in a user's loss" in log


def test_a_killed_rank_is_restarted_by_torchrun_and_the_job_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "output"
    train = {"steps": 300, "evaluate_every_steps": 300, "checkpoint": {"every_steps": 10}}
    started = command(tmp_path, {"devices_per_node": 2}, train, torchrun=[*TWO, "--max-restarts", "1"])
    with start(started, output) as process:
        wait_for(lambda: max(lines(output), default=0) >= 15, 200, "step 15")
        os.kill(read_pulses(tmp_path / "work")[1]["pid"], signal.SIGKILL)
        assert process.wait(timeout=250) == 0, output.read_text()[-3000:]
    assert "resumed" in output.read_text()
    assert sorted(lines(output)) == list(range(301))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_torchrun(how: signal.Signals, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with start(command(tmp_path, {"devices_per_node": 2}, LONG, torchrun=TWO), output) as process:
        wait_for(lambda: max(lines(output), default=0) >= 5, 200, "step 5")
        family = Family(process.pid)
        process.send_signal(how)
        process.wait(timeout=60)
    wait_for(lambda: not family.alive(), 180, "the end of all ranks")
    checkpoints = list((tmp_path / "work/checkpoints").glob("step-*"))
    assert bool(checkpoints) == (how == signal.SIGTERM), "asked to stop it checkpoints, killed it cannot"
