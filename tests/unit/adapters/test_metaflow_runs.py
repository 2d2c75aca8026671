"""Runs as Metaflow's client tells of them, of records that Metaflow wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ASK = """
import json
from metaflow import Flow, namespace
from posttrain_lib.adapters.metaflow_runs import run_by_id
namespace(None)
(run,) = Flow("GrowingFlow")
found = run_by_id("GrowingFlow", run.id, where="here")
print(json.dumps([found.state, sorted(found.manifests), found.config]))
"""


NAMELESS = """
import sys
from posttrain_lib.adapters.metaflow_runs import flows, run_by_id
print(flows(), run_by_id("GrowingFlow", sys.argv[1], where="here").config)
"""


def python(home: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=home, capture_output=True, text=True, check=False
    )


def test_a_resumed_run_that_was_killed_has_all_of_its_manifests(tmp_path: Path) -> None:
    """A resume copies steps side by side, in any order: here the first one last."""
    python(tmp_path, str(ROOT / "tests/support/growing_flow.py"), "--no-pylint", "run")
    (first,) = tmp_path.glob(".metaflow/GrowingFlow/*/start/_meta/_self.json")
    record = json.loads(first.read_text())
    first.write_text(json.dumps({**record, "ts_epoch": record["ts_epoch"] + 3_600_000}))
    asked = python(tmp_path, "-c", ASK)
    assert asked.returncode == 0, asked.stderr
    state, manifests, config = json.loads(asked.stdout)
    assert state.startswith("not finished")
    assert manifests == ["second", "start", "third"] and config == {"name": "growing"}


def test_who_has_no_name_sees_every_run(tmp_path: Path) -> None:
    """As root in a container: flows name such a user for Metaflow, and ``python -m steps...`` looks runs up, too."""
    python(tmp_path, str(ROOT / "tests/support/growing_flow.py"), "--no-pylint", "run", METAFLOW_USER="ann")
    (start,) = tmp_path.glob(".metaflow/GrowingFlow/*/start")
    nobody = dict.fromkeys(("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER"), "root")
    asked = python(tmp_path, "-c", NAMELESS, start.parent.name, **nobody)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip() == "('GrowingFlow',) {'name': 'growing'}"
