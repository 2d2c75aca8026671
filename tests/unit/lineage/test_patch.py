"""A patch brings a checkout's changes back, and the checkout knows nothing of its making. Real git, real checkouts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from posttrain_lib.lineage import patch
from posttrain_lib.lineage.patch import uncommitted


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text("ignored\n")
    (folder / "kept.py").write_text("a = 1\n")
    (folder / "gone.py").write_text("b = 1\n")
    (folder / "staged.py").write_text("c = 1\n")
    (folder / "picture").write_bytes(bytes(range(256)))
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def change_everything(folder: Path) -> None:
    (folder / "kept.py").write_text("a = 2\n")
    (folder / "gone.py").unlink()
    (folder / "picture").write_bytes(bytes(reversed(range(256))))
    (folder / "staged.py").write_text("c = 2\n")
    (folder / "staged_new.py").write_text("new and added\n")
    git(folder, "add", "staged.py", "staged_new.py")
    (folder / "staged.py").write_text("c = 3\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "new [x]*.py").write_text("not added\n")
    (folder / "deep" / "latin").write_bytes("é\n".encode("latin-1"))
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "ignored").write_text("not the project's")


def test_a_patch_brings_everything_back(checkout: Path, tmp_path: Path) -> None:
    change_everything(checkout)
    found = uncommitted(checkout)
    assert found.content is not None and not found.left_out
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    (tmp_path / "changes.patch").write_bytes(found.content)
    git(clone, "apply", str(tmp_path / "changes.patch"))
    wanted = files(checkout)
    del wanted["ignored"]
    assert files(clone) == wanted
    assert (clone / "run.sh").stat().st_mode & 0o111


def test_the_checkout_is_left_as_it_was(checkout: Path) -> None:
    change_everything(checkout)
    status = git(checkout, "--no-optional-locks", "status", "--porcelain")
    before = {path: path.read_bytes() for path in (checkout / ".git").rglob("*") if path.is_file()}
    uncommitted(checkout)
    assert {path: path.read_bytes() for path in (checkout / ".git").rglob("*") if path.is_file()} == before
    assert git(checkout, "status", "--porcelain") == status


def test_equal_changes_are_one_patch(checkout: Path) -> None:
    """Whether they were added is nothing that a patch tells."""
    change_everything(checkout)
    first = uncommitted(checkout)
    git(checkout, "add", "-A")
    assert uncommitted(checkout) == first


def test_people_s_own_settings_of_git_change_nothing(checkout: Path) -> None:
    change_everything(checkout)
    plain = uncommitted(checkout)
    for name, value in (("diff.mnemonicPrefix", "true"), ("color.ui", "always"), ("diff.external", "false")):
        git(checkout, "config", name, value)
    assert uncommitted(checkout) == plain


def test_only_what_is_below_the_root(checkout: Path) -> None:
    (checkout / "sub").mkdir()
    (checkout / "sub" / "mine.py").write_text("x\n")
    (checkout / "kept.py").write_text("a = 3\n")
    content = uncommitted(checkout / "sub").content
    assert content is not None
    assert b"+++ b/sub/mine.py" in content and b"kept.py" not in content


def test_a_large_untracked_file_is_left_out_and_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "MAX_UNTRACKED_BYTES", 100)
    (checkout / "rows.jsonl").write_text("x" * 101)
    (checkout / "small.py").write_text("x\n")
    found = uncommitted(checkout)
    assert found.left_out == "rows.jsonl (0.0 MiB)"
    assert found.content is not None
    assert b"small.py" in found.content and b"rows.jsonl" not in found.content


def test_a_patch_beyond_the_bound_is_not_kept_and_said(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "MAX_PATCH_BYTES", 100)
    (checkout / "kept.py").write_text("a = 2\n" * 100)
    found = uncommitted(checkout)
    assert found.content is None and "of changes; at most" in found.reason


def test_outside_of_a_checkout_git_s_own_words_are_the_reason(tmp_path: Path) -> None:
    found = uncommitted(tmp_path)
    assert found.content is None and "not a git repository" in found.reason


def test_a_change_of_equal_length_in_the_second_of_the_commit_is_seen(checkout: Path) -> None:
    """Git goes by size and time, and by the index's own time where these cannot tell."""
    path, index, then = checkout / "kept.py", checkout / ".git" / "index", (1_000_000_000, 1_000_000_000)
    git(checkout, "config", "core.trustctime", "false")  # which no test can set back
    os.utime(path, then)
    git(checkout, "update-index", "--refresh")
    path.write_text("a = 8\n")
    for file in (path, index):
        os.utime(file, then)
    content = uncommitted(checkout).content
    assert content is not None and b"+a = 8" in content
