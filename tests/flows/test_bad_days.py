"""Ctrl-C in every step, two runs at once, a killed driver: what a user's bad day leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows.test_sft_flow import FLOW, TINY, environment, flow

STEPS = ("inputs", "prepare_data", "check_serving", "convert_model", "train", "evaluate", "export")

pytestmark = pytest.mark.slow


class Started:
    """A flow in a process group of its own, its output in a file."""

    def __init__(self, home: Path, name: str, *arguments: str) -> None:
        self.log = home / f"{name}.log"
        command = [sys.executable, str(FLOW), "--no-pylint", "--config", str(TINY), "run", *arguments]
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                command,
                env=environment(home),
                cwd=home,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell's background jobs ignore Ctrl-C, and so would everything that they start.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, said: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while said not in self.text():
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()
            time.sleep(0.05)

    def interrupt(self) -> int:
        """What Ctrl-C in a terminal does: SIGINT to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout=60)


def processes_naming(text: str) -> list[str]:
    """Command lines of living processes that hold ``text`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("step", STEPS)
def test_ctrl_c_leaves_nothing_half_done_and_the_next_run_goes_on(step: str, tmp_path: Path) -> None:
    # The small run file leaves this step out: vLLM takes half a minute to start.
    settings = ("--set", "data.serving_check=vllm") if step == "check_serving" else ()
    run = Started(tmp_path, "first", *settings)
    run.wait_for(f"{step}: running")
    assert run.interrupt() != 0
    store = tmp_path / "store"
    published = {path.parent.parent.name for path in store.glob("steps/*/*/manifest.json")}
    assert step not in published
    deadline = time.monotonic() + 60
    while (left := processes_naming(str(store))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, "processes of the run outlive it by a minute"
    again = flow(tmp_path, "run", *settings)
    assert again.returncode == 0, again.stdout
    for name in STEPS[: STEPS.index(step)]:
        assert f"{name}: reused" in again.stdout


def test_two_runs_at_once_do_the_work_once(tmp_path: Path) -> None:
    runs = [Started(tmp_path, name) for name in ("one", "two")]
    for run in runs:
        assert run.process.wait(timeout=280) == 0, run.text()
    texts = [run.text() for run in runs]
    for step in STEPS:
        assert sorted(f"{step}: running" in text for text in texts) == [False, True], step
    assert any("the same work is under way in another run" in text for text in texts)
