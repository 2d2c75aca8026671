"""Pulses, the watchdog, and stacks of a rank that hangs in Python and of one that holds the interpreter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain_lib.compute.heart import DRIVER, Heart, Watchdog, ask_all_to_stop, clear, ranks_folder, read_pulses
from posttrain_lib.errors import RETRY_EXIT_CODE
from posttrain_lib.training import pulse


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_pulse_is_written_and_a_stop_is_heard(tmp_path: Path) -> None:
    clear(tmp_path)
    with Heart(tmp_path, 2, 4):
        pulse.beat("training step", 5)
        wait_for(lambda: read_pulses(tmp_path).get(2, {}).get("step") == 5)
        assert pulse.stop_reason() is None
        ask_all_to_stop(tmp_path, "the driver got SIGTERM")
        wait_for(lambda: pulse.stop_reason() == "the driver got SIGTERM")
        pulse.beat("checkpoint")
    last = read_pulses(tmp_path)[2]
    assert (last["phase"], last["beats"], last["pid"]) == ("checkpoint", 2, os.getpid()), "the last one is written too"
    assert [phase for phase, _ in last["timeline"]] == ["training step", "checkpoint"]
    clear(tmp_path)
    assert read_pulses(tmp_path) == {}


HANGS = """
import sys, time
from pathlib import Path
from posttrain_lib.compute.heart import Heart
from posttrain_lib.training import pulse
def stuck_here():
    {body}
with Heart(Path(sys.argv[1]), 1, 2):
    pulse.beat("waiting for data", 3)
    time.sleep(1.5)  # the pulse is written
    stuck_here()
"""
SLEEPS = "time.sleep(600)"
#: native code that does not let go of the interpreter: no thread of Python runs beside it
HOLDS = "import ctypes; ctypes.PyDLL(None).sleep(600)"


@pytest.mark.parametrize("body", [SLEEPS, HOLDS], ids=["sleeps", "holds the interpreter"])
def test_a_watchdog_names_rank_step_phase_and_stack(body: str, tmp_path: Path) -> None:
    clear(tmp_path)
    others = {"step": 3, "phase": "training step", "beats": 9, "pid": 1, "host": "elsewhere"}
    for rank in (0, 2):
        (ranks_folder(tmp_path) / f"rank-{rank}.json").write_text(json.dumps(others))
    with subprocess.Popen([sys.executable, "-c", HANGS.format(body=body), str(tmp_path)]) as process:
        try:
            wait_for(lambda: read_pulses(tmp_path).get(1, {}).get("phase") == "waiting for data")
            dog, said = Watchdog(tmp_path, 2.0), None
            deadline = time.monotonic() + 60
            while said is None and time.monotonic() < deadline:
                time.sleep(0.1)
                said = dog.check()
        finally:
            process.kill()
    assert said is not None
    assert "rank 1 at step 3, waiting for data; ranks 0, 2 at step 3, training step" in said
    assert said.index("stacks of rank 1") < said.index("stacks of rank 0")
    assert "stuck_here" in said
    assert "(it did not answer)" in said, "ranks of another machine that is gone"


def test_what_moves_is_no_hang(tmp_path: Path) -> None:
    clear(tmp_path)
    path, dog = ranks_folder(tmp_path) / "rank-0.json", Watchdog(tmp_path, 0.5)
    content = {"step": 0, "phase": "model", "pid": 1, "host": "elsewhere"}
    for beats in range(12):  # longer in all than the limit
        path.write_text(json.dumps({**content, "beats": beats}))
        time.sleep(0.1)
        assert dog.check() is None


OWN = """
import sys, time
from pathlib import Path
from posttrain_lib.compute.heart import Heart, OwnWatch, clear
work = Path(sys.argv[1])
clear(work)
with OwnWatch(work, 1.5), Heart(work, 0, 1):
    time.sleep(600)
"""


def test_a_hung_driver_that_is_a_rank_ends_itself_and_may_be_tried_again(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", OWN, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == RETRY_EXIT_CODE
    assert "no rank has moved" in done.stderr
    assert "time.sleep(600)" in done.stderr or 'File "<string>", line 8' in done.stderr


def test_a_driver_that_works_too_is_called_so(tmp_path: Path) -> None:
    clear(tmp_path)
    with Heart(tmp_path, DRIVER, 1):
        pulse.beat("rollouts", 4)
        wait_for(lambda: DRIVER in read_pulses(tmp_path))
        dog, said = Watchdog(tmp_path, 0.5), None
        deadline = time.monotonic() + 60
        while said is None and time.monotonic() < deadline:
            time.sleep(0.1)
            said = dog.check()
    assert said is not None and "the driver at step 4, rollouts" in said
