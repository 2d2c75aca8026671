"""The launcher with real Ray: one and two workers, a killed worker, errors that are the user's, orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain_lib.compute.launch import launch
from posttrain_lib.compute.processes import SESSION_FILE, descendants, remove_orphans, started_at
from posttrain_lib.config.compute import ComputeConfig
from posttrain_lib.errors import ConfigError, TrainingError
from posttrain_lib.losses.base import Loss
from posttrain_lib.schema.reports import StepReport, TrainResult
from posttrain_lib.training.job import TrainJob
from tests.oracles.tiny_job import make_job, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def drain(
    job: TrainJob, compute: ComputeConfig, watch: Callable[[StepReport], None] = lambda _: None
) -> tuple[list[StepReport], TrainResult]:
    events, reports = launch(job, compute), []
    while True:
        try:
            reports.append(next(events))
        except StopIteration as end:
            return reports, end.value
        watch(reports[-1])


def ray_processes() -> dict[int, str]:
    """Processes below this one that belong to Ray, by title; never those of another run on this machine."""
    found = {}
    for pid in descendants(os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "ray::" in title or "/raylet" in title or "gcs_server" in title:
            found[pid] = title.strip()
    return found


def kill_workers(most: int) -> list[int]:
    actors = [pid for pid, title in ray_processes().items() if title.startswith("ray::TrainingWorker")]
    for pid in actors[:most]:
        os.kill(pid, signal.SIGKILL)
    return actors[:most]


@pytest.mark.slow
def test_in_process_and_one_and_two_workers_train_alike(tmp_path: Path) -> None:
    config = tiny_config(steps=4)
    here, result = drain(make_job(tmp_path, config, work="here"), ComputeConfig(launcher="in_process", device="cpu"))
    for workers in (1, 2):
        job = make_job(tmp_path, config, work=f"ray{workers}")
        reports, ended = drain(job, ComputeConfig(launcher="ray", devices_per_node=workers, device="cpu"))
        assert [report.step for report in reports] == [report.step for report in here]
        # float32 sums in another order, grown through four updates of Adam
        assert [report.loss for report in reports[1:]] == pytest.approx([r.loss for r in here[1:]], rel=1e-5)
        assert ended.step == result.step
        assert ended.best_held_out == pytest.approx(result.best_held_out, rel=1e-5)
        assert Path(ended.last_checkpoint).is_dir()
        assert not (tmp_path / f"ray{workers}" / SESSION_FILE).exists()
        logs = sorted(path.name for path in (tmp_path / f"ray{workers}" / "logs").iterdir())
        assert logs == [f"rank-{rank}.log" for rank in range(workers)]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    config = tiny_config(steps=400, evaluate_every_steps=400, checkpoint={"every_steps": 20})
    undisturbed, _ = drain(make_job(tmp_path, config, work="whole"), ComputeConfig(launcher="in_process", device="cpu"))
    killed: list[int] = []

    def kill_one(report: StepReport) -> None:
        if report.step >= 45 and not killed:  # well behind the first checkpoint
            killed.extend(kill_workers(1))

    reports, result = drain(
        make_job(tmp_path, config), ComputeConfig(devices_per_node=2, device="cpu", retries=1), kill_one
    )
    assert len(killed) == 1
    assert result.step == 400
    assert sum(report.event.startswith("resumed") for report in reports) == 1
    last = {report.step: report.loss for report in reports if report.step}
    assert sorted(last) == list(range(1, 401))
    compared = undisturbed[1:61]
    assert [last[report.step] for report in compared] == pytest.approx(
        [report.loss for report in compared],
        rel=1e-3,  # sixty updates grow float32 rounding (measured: below 1e-4)
    )


@pytest.mark.slow
def test_a_worker_lost_too_often_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    def kill_all(report: StepReport) -> None:
        if report.step >= 5:
            kill_workers(2)

    job = make_job(tmp_path, tiny_config(steps=5000, evaluate_every_steps=5000))
    with pytest.raises(TrainingError, match="lost 1 times"):
        drain(job, ComputeConfig(launcher="ray", device="cpu", retries=0), kill_all)
    assert list((tmp_path / "work/checkpoints").glob("step-*")), "what was trained is kept"


class BrokenLoss(Loss):
    """A user's loss with a mistake in it, on one rank."""

    def divisor(self, batch: object) -> float:
        return 1.0

    def __call__(self, model: object, batch: object) -> object:
        raise ZeroDivisionError("a mistake in a user's loss")


@pytest.mark.slow
def test_errors_of_the_user_come_back_as_they_are_and_are_not_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = ComputeConfig(devices_per_node=2, device="cpu", retries=2)
    diverging = tiny_config(
        steps=9, clip_norm=None, optimizer={"name": "sgd", "lr": 1e30}, schedule={"name": "constant"}
    )
    seen: list[int] = []
    with pytest.raises(TrainingError, match="of step 2 is not finite"):
        drain(make_job(tmp_path, diverging, work="diverging"), compute, lambda report: seen.append(report.step))
    assert seen == [0, 1]

    broken = tiny_config(loss="tests.distributed.test_ray:BrokenLoss")
    with pytest.raises(TrainingError, match="ZeroDivisionError: a mistake in a user's loss") as caught:
        drain(make_job(tmp_path, broken, work="broken"), compute)
    shown = capsys.readouterr().err
    assert "in __call__" in shown and "test_ray.py" in shown, "the traceback is on the terminal, before the reason"
    assert shown.count("a mistake in a user's loss") < 4, "of one rank, not of each"
    assert str(tmp_path / "broken/logs") in str(caught.value)
    assert caught.value.where is not None and "step 0, held-out loss" in caught.value.where


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind_for_long(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(steps=10_000, evaluate_every_steps=10_000))
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from posttrain_lib.compute.launch import launch
        from posttrain_lib.config.compute import ComputeConfig
        from tests.oracles.tiny_job import make_job, tiny_config
        job = make_job(Path(sys.argv[1]), tiny_config(steps=10_000, evaluate_every_steps=10_000))
        for report in launch(job, ComputeConfig(launcher="ray", device="cpu")):
            print(report.step, flush=True)
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline().strip() == "0"
        with pytest.raises(ConfigError, match="another process is training"):
            remove_orphans(Path(job.work_dir))
        family = set(ray_processes())
        started = {pid: started_at(pid) for pid in family}
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    # Nobody starts anything here again: the watcher has to do it.
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and any(started_at(pid) == at for pid, at in started.items()):
        time.sleep(0.2)
    assert [pid for pid, at in started.items() if started_at(pid) == at] == []
    while time.monotonic() < deadline and (Path(job.work_dir) / SESSION_FILE).exists():
        time.sleep(0.2)
    assert not (Path(job.work_dir) / SESSION_FILE).exists()


def test_a_dead_address_is_said_at_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config())
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ConfigError, match="no Ray cluster answers"):
            drain(job, ComputeConfig(address=address))
