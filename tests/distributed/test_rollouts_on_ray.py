"""A job of rollouts through the one launch interface: the controller in the driver, the policy on two actors."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.compute.processes import SESSION_FILE
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.errors import ConfigError
from posttrain_lib.schema.reports import StepReport
from tests.distributed.test_launch_cluster import Nodes, cluster  # noqa: F401  (a fixture)
from tests.support.driven_rollouts import drain, job_in, write_inputs
from tests.support.launched import Family, start, wait_for
from tests.support.policy_jobs import actors

ON_TWO = ComputeConfig(devices_per_node=2, device="cpu", threads_per_worker=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("rollouts"))


@pytest.mark.slow
def test_two_actors_are_trained_as_one_process_is(folder: Path) -> None:
    alone, first = drain(job_in(folder, "alone"), ComputeConfig(device="cpu", threads_per_worker=1))
    family: list[Family] = []
    both, second = drain(job_in(folder, "two"), ON_TWO, lambda report: family.append(Family(os.getpid())))
    assert [report.step for report in both] == [report.step for report in alone] == [0, 1, 2, 3]
    assert first.step == second.step == 3 and Path(second.last_checkpoint).is_dir()
    assert alone[0].held_out == both[0].held_out  # by greedy answers of the same weights
    # The first update learns from the same draws; float32 sums over two ranks are in another order. Later draws may
    # differ where a weight did.
    assert alone[1].loss == pytest.approx(both[1].loss, rel=1e-4, abs=1e-6)
    assert alone[1].grad_norm == pytest.approx(both[1].grad_norm, rel=1e-4)
    for report in both[1:]:
        assert report.figures["policy/reference_kl"] >= 0 and report.figures["mismatch/kl"] < 1e-3
    assert not (folder / "two" / SESSION_FILE).exists()
    assert sorted(path.name for path in (folder / "two" / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    ended = [pid for pid in family[-1].alive() if pid != os.getpid()]
    wait_for(lambda: not [pid for pid in family[-1].alive() if pid in ended], 180, "Ray's processes to end")


@pytest.mark.slow
def test_a_lost_actor_is_replaced_and_the_run_goes_on(folder: Path) -> None:
    killed: list[int] = []

    def kill_one(report: StepReport) -> None:
        if report.step == 2 and not killed:
            killed.append(actors()[1])
            os.kill(killed[0], signal.SIGKILL)

    reports, result = drain(job_in(folder, "killed", updates=4, reference=False), ON_TWO, kill_one)
    assert killed and result.step == 4
    again = next(number for number, report in enumerate(reports) if report.event == "resumed")
    assert [report.step for report in reports[again + 1 :]] == list(range(reports[again].step + 1, 5))


def test_torchrun_is_refused(folder: Path) -> None:
    compute: dict[str, Any] = {**vars(ON_TWO), "launcher": "torchrun"}
    with pytest.raises(ConfigError, match="driven from one process"):
        drain(job_in(folder, "torchrun"), ComputeConfig(**compute))


@pytest.mark.slow
def test_a_cluster_by_its_address(folder: Path, cluster: Nodes, tmp_path: Path) -> None:  # noqa: F811
    compute = {"nodes": 2, "address": cluster.address, "device": "cpu", "threads_per_worker": 1}
    program = [sys.executable, "-m", "tests.support.driven_rollouts", str(folder), "cluster", json.dumps(compute)]
    with start(program, tmp_path / "output") as driver:
        assert driver.wait(timeout=280) == 0, (tmp_path / "output").read_text()
    steps = [line.split()[0] for line in (tmp_path / "output").read_text().splitlines() if "0x" in line]
    assert steps == ["0", "1", "2", "3"]
    assert sorted(path.name for path in (folder / "cluster/logs").iterdir()) == ["rank-0.log", "rank-1.log"]


@pytest.mark.slow
def test_a_killed_driver_leaves_no_actor(folder: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.support.driven_rollouts", str(folder), "orphans", ON_TWO.model_dump_json()]
    with start(program, tmp_path / "output") as driver:
        log = folder / "orphans/ranks/rank-1.json"
        wait_for(lambda: log.exists() and json.loads(log.read_text())["step"] >= 1, 200, "the first update")
        family = Family(driver.pid)
        driver.kill()
    wait_for(lambda: not family.alive(), 180, "the watcher to end what is left")
    wait_for(lambda: not (folder / "orphans" / SESSION_FILE).exists(), 120, "its record to be taken away")
