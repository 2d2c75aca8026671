"""What stands beside an exported reward model for its reader."""

from __future__ import annotations

import re
from pathlib import Path

from posttrain_lib.checkpoint.score_folder import README_FILE, write_score_readme


def code_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / README_FILE).read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_white_space_behind_the_scored_token_is_said(tmp_path: Path) -> None:
    said = write_score_readme(tmp_path, "\n")
    assert said is not None and r"'\n'" in said and README_FILE in said
    assert r"writes '\n' there" in (tmp_path / README_FILE).read_text(encoding="utf-8")
    compile(code_of(tmp_path), README_FILE, "exec")


def test_a_template_that_ends_at_the_marker_needs_no_word(tmp_path: Path) -> None:
    assert write_score_readme(tmp_path, "") is None
    assert "writes nothing there" in (tmp_path / README_FILE).read_text(encoding="utf-8")
