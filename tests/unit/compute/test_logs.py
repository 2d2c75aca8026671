"""Logs of ranks: whole lines with a prefix, native output too, and a tail that never shows half a line."""

import os
import subprocess
import sys
from pathlib import Path

from posttrain_lib.compute.logs import Tail, last_lines, log_path

PROGRAM = """
import os, sys, warnings
from pathlib import Path
from posttrain_lib.compute.logs import redirect
redirect(Path(sys.argv[1]), 3)
print("one"); print("two", end=""); print(" halves")
os.write(1, b"native\\n")
warnings.warn("twice?")
sys.stderr.write("no end")
raise RuntimeError("a mistake")
"""


def test_everything_that_a_process_says_is_in_its_log(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    text = log_path(tmp_path, 3).read_text()
    head, *lines = text.splitlines()
    assert head.startswith("--- rank 3, process ")
    assert lines[:3] == ["rank 3 | one", "rank 3 | two halves", "native"]
    assert any(line.startswith("rank 3 | ") and "UserWarning: twice?" in line for line in lines)
    assert any("RuntimeError: a mistake" in line for line in lines)
    assert last_lines(tmp_path, 3, most=1) == lines[-1]
    assert last_lines(tmp_path, 4) == ""


def test_a_tail_shows_whole_lines_once_and_only_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.log"
    assert Tail(path).lines() == []
    path.write_text("of an earlier attempt\n")
    tail = Tail(path)
    with open(path, "ab", buffering=0) as log:
        log.write(b"--- rank 0, process 7\nrank 0 | a\nrank 0 | ha")
        assert tail.lines() == ["rank 0 | a"]
        log.write(b"lf\n")
        assert tail.lines() == ["rank 0 | half"]
        assert tail.lines() == []
    assert os.path.getsize(path) > 0
