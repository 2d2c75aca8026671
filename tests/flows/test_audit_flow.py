"""An audit as a flow: what does not hold fails it, and its card shows what that is."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain_lib.lineage.store import Store
from steps.promote import promote
from tests.support.exported import folder_of, publish_run
from tests.support.retrains import FLOW, TINY, Retrains

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def audited(made: Retrains, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The flow's own command line, run to its end."""
    command = [sys.executable, str(FLOW.with_name("audit_flow.py")), "--no-pylint", "--config", str(TINY), *arguments]
    return subprocess.run(command, env=made.environment(), cwd=made.home, capture_output=True, text=True)


def card_of(made: Retrains) -> str:
    target = made.home / "card.html"
    done = audited(made, "card", "get", "start", str(target), "--id", "audit")
    assert done.returncode == 0, done.stdout + done.stderr
    data = re.search(r'__MF_DATA__\["[^"]+"\] = "([A-Za-z0-9+/=]+)"', target.read_text())
    assert data is not None
    return base64.b64decode(data.group(1)).decode()


def test_an_audit_that_fails_has_a_card(isolated_store: Path, tmp_path: Path) -> None:
    made = Retrains(tmp_path)
    assert made.home / "store" == isolated_store
    without = audited(made, "run")
    assert without.returncode != 0 and "there is no version yet" in without.stderr + without.stdout
    folder = folder_of(publish_run())
    promote(Store(), "tiny", str(folder))
    whole = audited(made, "run")
    assert whole.returncode == 0 and "every version has an entry in the history: 1\n" in whole.stdout
    assert "Audit of models/tiny: whole" in card_of(made)

    (folder / "model.safetensors").write_text("weighty")
    changed = audited(made, "run")
    said = changed.stdout + changed.stderr
    assert changed.returncode != 0 and "ModelError: the folder of version 1 is not what was promoted" in said
    assert "Traceback" not in said
    shown = card_of(made)
    assert "1 of 6 proofs failed" in shown and "FAILED" in shown
