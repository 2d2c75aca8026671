"""Recorded code is had again as it was: by its commit and patch; what a folder has otherwise is named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage import recorded_code
from posttrain_lib.lineage.digests import digest_bytes
from posttrain_lib.lineage.patch import uncommitted
from posttrain_lib.lineage.recorded_code import check_out, differing_files, has_commit


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(params=["", "part"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project at the top of a repository, or in a folder of it."""
    root = tmp_path / "repository" / request.param
    root.mkdir(parents=True)
    git(tmp_path / "repository", "init", "-q")
    (root / "a.py").write_text("a = 1\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    monkeypatch.setattr(recorded_code, "PROJECT_ROOT", root)
    return root


def test_a_commit_and_its_patch(checkout: Path, tmp_path: Path) -> None:
    first = git(checkout, "rev-parse", "HEAD")
    (checkout / "a.py").write_text("a = 2\n")
    (checkout / "new.py").write_text("b = 1\n")
    patch = tmp_path / "patch"
    content = uncommitted(checkout).content
    assert content is not None
    patch.write_bytes(content)
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "--amend", "-m", "another")  # no branch has the first commit any more
    assert has_commit(first) and not has_commit("0" * 40)
    plain, patched = (check_out(first, each, tmp_path / name) for name, each in (("plain", None), ("patched", patch)))
    assert (plain / "a.py").read_text() == "a = 1\n" and not (plain / "new.py").exists()
    assert (patched / "a.py").read_text() == "a = 2\n" and (patched / "new.py").read_text() == "b = 1\n"
    assert uncommitted(patched).content == content
    assert git(checkout, "worktree", "list").count("\n") == 0 and git(checkout, "status", "--porcelain") == ""


def test_a_patch_that_does_not_fit(checkout: Path, tmp_path: Path) -> None:
    patch = tmp_path / "patch"
    patch.write_text("diff --git a/none.py b/none.py\n--- a/none.py\n+++ b/none.py\n@@ -1 +1 @@\n-x\n+y\n")
    with pytest.raises(ConfigError, match="cannot be brought back") as error:
        check_out(git(checkout, "rev-parse", "HEAD"), patch, tmp_path / "clone")
    assert "--code here" in str(error.value)


def test_files_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "same.py").write_text("1")
    (tmp_path / "other.py").write_text("2")
    files = {name: digest_bytes(b"1") for name in ("same.py", "other.py", "gone.py")}
    assert differing_files(files, tmp_path) == ["other.py", "gone.py"]
    monkeypatch.syspath_prepend(tmp_path)
    assert differing_files({"no_such_module_here:Loss": "0"}, tmp_path) == ["no_such_module_here:Loss"]
