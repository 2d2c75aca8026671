"""The code that results were made with, had again: which of its files a folder has, and its commit with its patch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.digests import digest_file
from posttrain_lib.lineage.source_digest import PROJECT_ROOT, user_code


def differing_files(files: Mapping[str, str], root: Path) -> list[str]:
    """Names of those that ``root`` does not have as they were.

    Args:
        files: as :func:`posttrain_lib.lineage.kept.sources_of` tells them; a user's own code is looked for on the path.
    """
    return [name for name, digest in files.items() if _now(name, root) != digest]


def has_commit(commit: str) -> bool:
    """Whether the checkout's git knows the commit."""
    return _git(PROJECT_ROOT, "cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


def check_out(commit: str, patch: Path | None, folder: Path) -> Path:
    """Make ``folder`` a clone with that commit and, where there is one, that patch on it; the project's root in it.

    The clone shares the checkout's objects, and leaves its branches and worktrees alone.

    Raises:
        ConfigError: git cannot.
    """
    _must(PROJECT_ROOT, "clone", "-q", "--shared", "--no-checkout", _top(), str(folder))
    _must(folder, "checkout", "-q", "--detach", commit)
    if patch is not None:
        _must(folder, "apply", "--whitespace=nowarn", str(patch))
    prefix = _must(PROJECT_ROOT, "rev-parse", "--show-prefix").strip()
    return folder / prefix


def _now(name: str, root: Path) -> str | None:
    if ":" in name:
        return user_code([name]).get(name)
    path = root / name
    return digest_file(path) if path.is_file() else None


def _top() -> str:
    return _must(PROJECT_ROOT, "rev-parse", "--show-toplevel").strip()


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A hook's variables would name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _must(root: Path, *arguments: str) -> str:
    done = _git(root, *arguments)
    if done.returncode != 0:
        raise ConfigError(
            "the recorded code cannot be brought back",
            where=root,
            got=f"git {' '.join(arguments)}: {done.stderr.strip()}",
            fix="--code here runs the checkout's code instead, and the comparison says what differs",
        )
    return done.stdout
