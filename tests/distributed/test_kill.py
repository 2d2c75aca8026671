"""A training process killed at a random step, as often as it takes: the curve and the weights stay the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch

from posttrain_lib.checkpoint.manager import load_model_state
from posttrain_lib.training.loop import train
from tests.oracles.tiny_job import make_job, tiny_config

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


def start(folder: Path) -> subprocess.Popen[str]:
    # A pause after each step, so that the kill finds it between any two lines
    command = [sys.executable, "-m", "tests.oracles.tiny_job", str(folder), str(STEPS), "0.02"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    job = make_job(tmp_path, tiny_config(steps=STEPS), work="whole")
    expected = {report.step: "-" if report.loss is None else float(report.loss).hex() for report in train(job)}

    chosen = random.Random(0)  # other steps at every kill, the same in every test run
    seen: dict[int, str] = {}
    resumes = 0
    for kill_after in [chosen.randrange(3, 7), chosen.randrange(7, STEPS - 1), None]:
        with start(tmp_path) as process:
            assert process.stdout is not None
            for line in process.stdout:
                number, loss, *event = line.split(maxsplit=2)
                resumes += bool(event) and event[0].startswith("resumed")
                step = int(number)
                assert seen.setdefault(step, loss) == loss, f"step {step} came out differently after a kill"
                if step == kill_after:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
    assert resumes == 2
    assert seen == expected

    one = load_model_state(tmp_path / f"whole/checkpoints/step-{STEPS:08d}")
    other = load_model_state(tmp_path / f"killed/checkpoints/step-{STEPS:08d}")
    assert all(torch.equal(one[name], other[name]) for name in one)
