"""The command line as people write it, turned into what Metaflow takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FLOWS = Path(__file__).resolve().parents[2] / "flows"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("run", "run"),
        ("--config a.yaml run", "--config config a.yaml run"),
        ("run --config a.yaml --tag x", "--config config a.yaml run --tag x"),
        ("run --config=a.yaml", "--config config a.yaml run"),
        ("--config config a.yaml run", "--config config a.yaml run"),
        ("run --set a=1 --set b=2 --set c=3", "run --set a=1,b=2,c=3"),
        ("run --set a=1,b=2", "run --set a=1,b=2"),
        ("run --set=a=1 --set=b=2 --set c=3 --set=d=4", "run --set a=1,b=2,c=3,d=4"),
    ],
)
def test_options(given: str, wanted: str) -> None:
    """In a process of its own: importing the module changes ``sys.argv`` and the environment."""
    program = "import json, posttrain_flow as f, sys; print(json.dumps(f.plain_options(json.loads(sys.stdin.read()))))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=FLOWS, input=json.dumps(given.split()), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted.split()
