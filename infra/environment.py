"""Make the project's environment from its lock file once, then run a command in it. Called by ``infra/env``.

Standard library only: this runs before anything is installed. Variables that it reads:

    POSTTRAIN_PYTHON            the Python 3.11 to use (read by infra/env)
    POSTTRAIN_ACCELERATOR       cpu or gpu: which lock; by default gpu where an NVIDIA GPU is seen, else cpu
    POSTTRAIN_TORCH_INDEX_URL   one more index, for torch alone (for example one that offers its CPU builds)
    PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, ...   pip's own, read by pip

The environment is ``.venv`` in the checkout. ``.venv/.posttrain-lock`` is written last and holds the digest of the
lock; an environment without it, with another digest, or in another place is thrown away and made again.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
#: read by posttrain_lib/lineage/environment.py; its first word is the digest of the lock
MARKER = VENV / ".posttrain-lock"
#: written first: says that the folder is ours, so that only an environment made here is ever thrown away
BEGUN = VENV / ".posttrain-environment"
LOG = ROOT / ".venv-install.log"
GUARD = ROOT / ".venv-guard"

#: what every command gets unless the caller has set it
SETTINGS = {
    "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(ROOT),  # else Metaflow searches the parent folders for a .metaflow
    "TOKENIZERS_PARALLELISM": "false",  # its threads warn, or hang, after a fork
    # nothing is reported to anyone
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "WANDB_ERROR_REPORTING": "false",
    "ANONYMIZED_TELEMETRY": "false",
}


class InstallError(Exception):
    """The environment could not be made; the text says why and what to do."""


def main(command: list[str]) -> None:
    """Make the environment where needed, then become ``command`` (its exit status is this one's)."""
    if not command:
        raise InstallError("nothing to run. For example: ./infra/env pytest")
    lock = ROOT / "infra" / "locks" / f"{accelerator()}.txt"
    marker = marker_text(lock)
    if not is_made(marker):
        with GUARD.open("a") as guard:
            announce_wait(guard)
            if not is_made(marker):  # the other process may have made it while this one waited
                install(lock, marker)
    become(command)


def accelerator() -> str:
    """``cpu`` or ``gpu``: the caller's word, else whether the NVIDIA driver shows a device."""
    chosen = os.environ.get("POSTTRAIN_ACCELERATOR", "")
    if chosen not in ("", "cpu", "gpu"):
        raise InstallError(f"POSTTRAIN_ACCELERATOR is {chosen!r}; it can be cpu or gpu")
    seen = glob.glob("/dev/nvidia[0-9]*") or glob.glob("/proc/driver/nvidia/gpus/*")
    return chosen or ("gpu" if seen else "cpu")


def marker_text(lock: Path) -> str:
    """Digest of the lock, its name, and the place: scripts inside a virtual environment hold absolute paths."""
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    return f"{digest} {lock.name} {VENV}\n"


def is_made(marker: str) -> bool:
    """Whether ``.venv`` was completely made from exactly this lock, here."""
    try:
        return MARKER.read_text(encoding="utf-8") == marker and (VENV / "bin" / "python").exists()
    except FileNotFoundError:
        return False


def announce_wait(guard) -> None:
    """Take the guard, saying so where another process holds it. Released when its file is closed or all holders end.

    pip inherits it: where this process is killed, its pip goes on writing, and the next must wait for that too.
    """
    os.set_inheritable(guard.fileno(), True)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process is making the environment; waiting for it")
        fcntl.flock(guard, fcntl.LOCK_EX)


def install(lock: Path, marker: str) -> None:
    """Make ``.venv`` from nothing; the marker comes last, so a torn install is seen and made again."""
    start = time.monotonic()
    clear_away()
    say(f"making {VENV.name} from infra/locks/{lock.name} (once; a few minutes and about 5 GB). Log: {LOG.name}")
    LOG.write_text("", encoding="utf-8")
    make_venv()
    BEGUN.write_text("made by infra/env; safe to delete\n", encoding="utf-8")
    pins = read_pins(lock)
    say("1/4 pip and build tools")
    pip("install", *(pins[name] for name in ("pip", "setuptools", "wheel")))
    say("2/4 torch")
    install_torch(pins, gpu=lock.stem == "gpu")
    say(f"3/4 the other {len(pins)} packages")
    pip("install", "--no-deps", "--no-build-isolation", "--prefer-binary", "-r", str(lock))
    say("4/4 this project")
    pip("install", "--no-deps", "--no-build-isolation", "--no-index", "--editable", str(ROOT))
    draft = MARKER.with_suffix(".draft")
    draft.write_text(marker, encoding="utf-8")
    draft.replace(MARKER)
    say(f"environment ready after {time.monotonic() - start:.0f} s")


def clear_away() -> None:
    """Remove an older or torn environment of ours; refuse to touch one that is not."""
    if not VENV.exists() and not VENV.is_symlink():
        return
    if VENV.is_symlink() or not (BEGUN.exists() or MARKER.exists() or not any(VENV.iterdir())):
        raise InstallError(f"{VENV} is there and was not made by infra/env. Move it away (or delete it) and run again")
    MARKER.unlink(missing_ok=True)  # first: half deleted must not look complete
    keep = BEGUN.name  # last: half deleted must still be known as ours
    for entry in VENV.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != keep:
            entry.unlink()


def make_venv() -> None:
    """``python -m venv``, with the usual reason for its failure spelled out."""
    # Called from inside the very environment that is made again, sys.executable would be in the folder just emptied.
    python = getattr(sys, "_base_executable", None) or sys.executable
    done = subprocess.run([python, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (VENV / "bin" / "pip").exists():
        detail = (done.stdout + done.stderr).strip()
        raise InstallError(
            f"{python} cannot make a virtual environment: its venv or ensurepip module is missing or failed.\n"
            f"{detail}\nOn Debian and Ubuntu: apt-get install python3.11-venv"
        )


def read_pins(lock: Path) -> dict[str, str]:
    """``{name: "name==version"}`` of the lock, in its order."""
    lines = [line.split("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    return {line.split("==")[0].lower(): line for line in lines if line}


def install_torch(pins: dict[str, str], gpu: bool) -> None:
    """Install the pinned torch, in the build that suits the machine, with what that build needs.

    Without a GPU: the CPU build where an index offers it, else the default build. With a GPU: the default build, else
    any but the CPU one. A build for one CUDA version (``+cu...``), which pip would rank above the default build, is
    therefore never taken on a machine without a GPU, and on one with a GPU only from an index that has nothing else.
    """
    pin, version = pins["torch"], pins["torch"].split("==")[1]
    # triton is the one package that the torch builds and vLLM's CPU build pin differently; the lock's comes next.
    constraints = VENV / "constraints.txt"
    held = [line for name, line in pins.items() if name not in ("torch", "triton")]
    constraints.write_text("\n".join(held) + "\n", encoding="utf-8")
    extra_index = os.environ.get("POSTTRAIN_TORCH_INDEX_URL", "")
    options = ["-c", str(constraints), *(["--extra-index-url", extra_index] if extra_index else [])]
    default_build = f"torch==={version}"  # three signs: this spelling and no local part such as +cu130
    first, second = (default_build, f"{pin},!={version}+cpu") if gpu else (f"{pin}+cpu", default_build)
    try:
        pip("install", *options, first)
    except InstallError as error:
        if "No matching distribution found for torch" not in str(error):
            raise
        say(f"no {first} on this index; taking {second}")
        pip("install", *options, second)


def pip(*arguments: str) -> None:
    """Run the environment's pip, its output in the log; raises InstallError with the last lines of it."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        begin = log.tell()
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, close_fds=False
        )
        try:
            follow(running, begin)
        except KeyboardInterrupt:
            running.terminate()  # it got the terminal's Ctrl-C too, if there is a terminal
            running.wait()
            raise
    if running.returncode != 0:
        last = "\n".join(log_since(begin).splitlines()[-15:])
        raise InstallError(
            f"pip failed (exit {running.returncode}). Its last lines, all of it in {LOG.name}:\n{last}\n"
            "Check that the package index can be reached (PIP_INDEX_URL names another) and the disk has 6 GB free"
        )


def follow(running: subprocess.Popen[bytes], begin: int) -> None:
    """Wait for pip; every half minute say how far it is, by the log from ``begin`` on."""
    start = time.monotonic()
    while True:
        try:
            running.wait(timeout=30)
            return
        except subprocess.TimeoutExpired:
            lines = [line.strip() for line in log_since(begin).splitlines()]
            found = sum(line.startswith(("Collecting ", "Processing ")) for line in lines)
            at = "installing" if any(line.startswith("Installing collected") for line in lines) else "fetching"
            say(f"    {at}; {found} packages found, {time.monotonic() - start:.0f} s")


def log_since(begin: int) -> str:
    """What was written to the log after byte ``begin``."""
    return LOG.read_bytes()[begin:].decode("utf-8", errors="replace")


def become(command: list[str]) -> None:
    """Replace this process by the command, in the environment."""
    environment = dict(os.environ)
    for name, value in SETTINGS.items():
        environment.setdefault(name, value)
    if environment.get("USER", "root") in ("", "root"):
        environment.setdefault("METAFLOW_USER", "posttrain")  # Metaflow refuses root, and an unknown user
    environment["VIRTUAL_ENV"] = str(VENV)
    environment["PATH"] = f"{VENV / 'bin'}{os.pathsep}{environment.get('PATH', os.defpath)}"
    for name in ("PYTHONHOME", "__PYVENV_LAUNCHER__"):
        environment.pop(name, None)
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise InstallError(f"cannot run {command[0]!r}: {error.strerror}") from error


def say(text: str) -> None:
    """One line on stderr: stdout belongs to the command."""
    print(f"infra/env: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InstallError as problem:
        say(str(problem))
        sys.exit(1)
    except OSError as problem:  # a checkout that cannot be written, a full disk
        say(f"{problem.strerror}: {problem.filename or ROOT}. The environment is made in {VENV}, which needs 6 GB")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; the next call starts the install again")
        sys.exit(130)
