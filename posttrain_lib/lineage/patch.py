"""What a checkout has besides its commit, as a patch: changes of tracked files and files that are not tracked yet.

``git apply`` on the commit brings it back. Neither the index nor the objects of the checkout are touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

#: a patch above this is not kept
MAX_PATCH_BYTES = 8 * 2**20
#: an untracked file above this is left out of the patch: data, most likely
MAX_UNTRACKED_BYTES = 2**20
_SECONDS = 60.0
_NAMED = 10
_DIFF = ("diff", "--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/")


@dataclass(frozen=True)
class Patch:
    """The patch; None where it is not kept, and why. ``left_out``: untracked files too large for it, with sizes."""

    content: bytes | None
    reason: str = ""
    left_out: str = ""


def uncommitted(root: Path) -> Patch:
    """The patch of the checkout that ``root`` lies in, of what is below ``root``; files that git ignores are not."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _patch(root, Path(folder))
    except subprocess.CalledProcessError as error:
        return Patch(None, reason=f"git {error.cmd[4]} failed: {error.stderr.decode(errors='replace').strip()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Patch(None, reason=str(error))


def _patch(root: Path, scratch: Path) -> Patch:
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", ".").split(b"\0")[:-1]
    sizes = {name: (root / os.fsdecode(name)).lstat().st_size for name in untracked}
    large = [name for name, size in sizes.items() if size > MAX_UNTRACKED_BYTES]
    environment = _aside(root, scratch)
    # A file that is "intended to be added" stands in a diff, and nothing of it is written anywhere.
    small = b"\0".join(name for name in untracked if name not in large)
    if small:
        _git(root, "add", "-N", "--pathspec-from-file=-", "--pathspec-file-nul", given=small, environment=environment)
    content = _git(root, *_DIFF, "--dst-prefix=b/", "HEAD", "--", ".", environment=environment)
    left_out = _listed([f"{os.fsdecode(name)} ({_mib(sizes[name])})" for name in large])
    if len(content) > MAX_PATCH_BYTES:
        return Patch(None, f"{_mib(len(content))} of changes; at most {_mib(MAX_PATCH_BYTES)} are kept", left_out)
    return Patch(content, left_out=left_out)


def _aside(root: Path, scratch: Path) -> dict[str, str]:
    """Settings with which git works on a copy of the index and writes objects into ``scratch``."""
    index, objects = (
        root / os.fsdecode(_git(root, "rev-parse", "--git-path", name).rstrip(b"\n")) for name in ("index", "objects")
    )
    if index.is_file():
        # With its time: by that git knows which files may have changed within the second that it was written in.
        shutil.copy2(index, scratch / "index")
    (scratch / "objects").mkdir()
    return {
        **os.environ,
        "GIT_INDEX_FILE": str(scratch / "index"),
        "GIT_OBJECT_DIRECTORY": str(scratch / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects.absolute()),
        "GIT_LITERAL_PATHSPECS": "1",
    }


def _git(root: Path, *arguments: str, given: bytes = b"", environment: dict[str, str] | None = None) -> bytes:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    done = subprocess.run(command, input=given, env=environment, capture_output=True, timeout=_SECONDS, check=True)
    return done.stdout


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
