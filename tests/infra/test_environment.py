"""The wrapper that makes the environment: which lock, when it is made again, what it refuses; no index is asked."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==1.0.0"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with infra/ alone and a lock that no index could satisfy."""
    folder = tmp_path / "a checkout"
    (folder / "infra" / "locks").mkdir(parents=True)
    for name in ("env", "environment.py"):
        shutil.copy2(ROOT / "infra" / name, folder / "infra" / name)
    (folder / "infra" / "locks" / "cpu.txt").write_text(f"pip==0.0.1\nsetuptools==0.0.1\nwheel==0.0.1\n{TORCH}\n")
    return folder


def env(checkout: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "POSTTRAIN_PYTHON": sys.executable, "POSTTRAIN_ACCELERATOR": "cpu"}
    # No index and no local wheels: an install that starts, fails at once and without the network.
    settings |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout / "infra"), **variables}
    script = str(checkout / "infra" / "env")
    return subprocess.run([script, *command], env=settings, capture_output=True, text=True, timeout=120)


def pretend_made(checkout: Path) -> Path:
    """An environment with the marker of this lock, as a finished install leaves it. Returns the marker."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(checkout / ".venv")], check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import environment as e;"
        "e.MARKER.write_text(e.marker_text(e.ROOT / 'infra' / 'locks' / 'cpu.txt'))"
    )
    subprocess.run([sys.executable, "-B", "-c", code, str(checkout / "infra")], check=True)
    return checkout / ".venv" / ".posttrain-lock"


def test_a_made_environment_is_used_as_it_is(checkout: Path) -> None:
    pretend_made(checkout)
    code = "import os, sys; print(sys.prefix); print(os.environ['RAY_USAGE_STATS_ENABLED']); sys.exit(7)"
    done = env(checkout, "python", "-c", code)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == [str(checkout / ".venv"), "0"]
    assert done.stderr == ""


def test_the_callers_settings_are_kept(checkout: Path) -> None:
    pretend_made(checkout)
    code = "import os; print(os.environ['WANDB_MODE'], os.environ['METAFLOW_USER'])"
    done = env(checkout, "python", "-c", code, WANDB_MODE="offline", METAFLOW_USER="ada")
    assert done.stdout.split() == ["offline", "ada"]


@pytest.mark.parametrize("change", ["another lock", "torn", "moved"])
def test_any_other_environment_is_made_again(checkout: Path, change: str) -> None:
    marker = pretend_made(checkout)
    (marker.parent / ".posttrain-environment").write_text("ours")
    if change == "another lock":
        with (checkout / "infra" / "locks" / "cpu.txt").open("a") as lock:
            lock.write("more==1\n")
    elif change == "torn":
        marker.unlink()
    else:
        checkout = checkout.rename(checkout.with_name("elsewhere"))
    done = env(checkout, "python", "-c", "print('ran')")
    assert done.returncode == 1
    assert "making .venv from infra/locks/cpu.txt" in done.stderr
    assert "pip failed" in done.stderr  # there is no index here
    assert "No matching distribution found for pip==0.0.1" in done.stderr
    assert "ran" not in done.stdout
    assert not (checkout / ".venv" / ".posttrain-lock").exists()


def test_a_folder_of_someone_else_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").write_text("x")
    done = env(checkout, "true")
    assert done.returncode == 1
    assert "was not made by infra/env" in done.stderr
    assert (checkout / ".venv" / "mine").exists()


@pytest.fixture
def other_install(checkout: Path) -> Iterator[None]:
    """Another process that holds the guard."""
    with (checkout / ".venv-guard").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


@pytest.mark.usefixtures("other_install")
def test_two_at_once_wait_for_each_other(checkout: Path) -> None:
    settings = {**os.environ, "POSTTRAIN_PYTHON": sys.executable, "POSTTRAIN_ACCELERATOR": "cpu"}
    command = [str(checkout / "infra" / "env"), "true"]
    with subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert "waiting for it" in waiting.stderr.readline()
        assert not (checkout / ".venv").exists()
        waiting.terminate()


def test_what_is_wrong_is_said(checkout: Path) -> None:
    assert "nothing to run" in env(checkout).stderr
    assert "it can be cpu or gpu" in env(checkout, "true", POSTTRAIN_ACCELERATOR="tpu").stderr
    missing = env(checkout, "true", POSTTRAIN_PYTHON="/nowhere/python")
    assert missing.returncode == 1
    assert "no Python 3.11 found (tried /nowhere/python)" in missing.stderr
    pretend_made(checkout)
    assert "cannot run 'no-such-command'" in env(checkout, "no-such-command").stderr
