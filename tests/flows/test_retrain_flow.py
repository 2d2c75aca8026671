"""A week of daily retrains, and the days around it: real Metaflow runs of a tiny model."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.support.argo import datastore, s3_settings
from tests.support.retrains import FLOW, TINY, Retrains
from tests.support.s3 import s3_environment, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # nine runs of the flow


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Retrains]:
    """Its runs keep their artifacts, cards and code on an S3 server."""
    with s3_server() as url, s3_environment(url):
        fsspec.filesystem("s3").mkdir("posttrain")
        yield Retrains(tmp_path_factory.mktemp("week"), **s3_settings(url), **datastore(url))


@pytest.fixture(scope="module")
def played(week: Retrains) -> dict[str, str]:
    """What each day's run said."""
    said = {}
    week.land("2026-03-23.jsonl", 1)
    said["monday"] = week.run("monday")
    week.land("2026-03-24.jsonl", 2)
    said["tuesday"] = week.run("tuesday")
    said["wednesday"] = week.run("wednesday")  # a day without rows
    week.land_poison("2026-03-26.jsonl")
    said["thursday"] = week.run("thursday")

    week.land("2026-03-27.jsonl", 3)
    friday = week.start("friday")
    week.wait_for_checkpoint(friday, "friday")
    os.killpg(friday.pid, signal.SIGKILL)
    friday.wait()
    said["killed"] = (week.home / "friday").read_text()
    said["friday"] = week.run("friday again")

    week.land("2026-03-28.jsonl", 4)
    both = [week.start(name) for name in ("saturday", "saturday too")]
    assert [process.wait(timeout=500) for process in both] == [0, 0]
    said.update({name: (week.home / name).read_text() for name in ("saturday", "saturday too")})

    # The clocks change, the machine moves, and the file of a day before comes late.
    week.land("2026-03-22.jsonl", 5)
    said["sunday"] = week.run("sunday", TZ="Pacific/Kiritimati")
    return said


def files_of(week: Retrains, number: int) -> list[str]:
    """Names of the files that the decision took."""
    digest = week.pointer.history[number - 1].rows
    raw = json.loads((week.home / "store" / "models" / "tiny" / "rows" / f"{digest}.json").read_text())
    return [file["path"] for file in raw["files"]]


def test_the_decisions_of_the_week(week: Retrains, played: dict[str, str]) -> None:
    assert week.decisions == [
        ("promoted", 1), ("promoted", 2), ("rejected", 2), ("promoted", 3), ("promoted", 4), ("promoted", 5)
    ]  # fmt: skip
    assert [files_of(week, number) for number in range(1, 7)] == [
        [f"2026-03-{day}.jsonl"] for day in (23, 24, 26, 27, 28, 22)
    ]
    assert all(entry.at.endswith("+00:00") for entry in week.pointer.history)


def test_each_candidate_started_from_the_current_version(week: Retrains, played: dict[str, str]) -> None:
    for day, version in (("tuesday", 1), ("thursday", 2), ("friday", 2), ("saturday", 3), ("sunday", 4)):
        assert f"model.path: models/tiny@{version} = " in played[day], day
    assert "model.path: models/" not in played["monday"]


def test_an_empty_day_ends_well_and_promotes_nothing(played: dict[str, str]) -> None:
    assert "no new rows; nothing to train, version 2 stays the current one" in played["wednesday"]
    assert "train: running" not in played["wednesday"]


def test_a_poisoned_day_is_kept_out_by_a_fixed_suite_and_says_so(week: Retrains, played: dict[str, str]) -> None:
    assert "rejected" in played["thursday"] and "version 2 stays the current one" in played["thursday"]
    entry = week.pointer.history[2]
    assert entry.why.startswith("gate on the change of suite.logprob")
    held_out = next(gate for gate in entry.gates if gate["name"] == "the change of held_out.loss")
    assert held_out["holds"], "its own held-out rows are poisoned as well, and tell nothing"


def test_a_killed_run_leaves_no_decision_and_the_next_goes_on(week: Retrains, played: dict[str, str]) -> None:
    assert "models/tiny: promoted" not in played["killed"]
    assert "resumed" in played["friday"] and "promoted as version 3" in played["friday"]


def test_of_two_runs_at_once_one_decides(week: Retrains, played: dict[str, str]) -> None:
    runs = [played["saturday"], played["saturday too"]]
    assert all("promoted as version 4" in said for said in runs)
    decided = {said.split("promoted as version 4 by ")[1].split(":")[0] for said in runs}
    assert decided == {week.pointer.history[4].run}
    trained = [said for said in runs if "train: done in" in said]
    assert len(trained) == 1, "the other took what the first made"


def test_the_card_shows_gates_and_history(week: Retrains, played: dict[str, str]) -> None:
    target = week.home / "card.html"
    command = [sys.executable, str(FLOW), "--no-pylint", "--config", str(TINY), "card", "get", "promote", str(target)]
    done = subprocess.run(
        [*command, "--id", "retrain"], env=week.environment(), cwd=week.home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = shown_in(target)
    for said in ("Retrain of models/tiny", "the change of suite.logprob", "rejected", "2026-03-22.jsonl"):
        assert said in shown, said


def test_a_candidate_that_was_rejected_is_made_again_from_its_lineage(week: Retrains, played: dict[str, str]) -> None:
    """By the flow of its recipe, which ends with the gate that did not hold."""
    program = str(FLOW.with_name("reproduce_flow.py"))
    command = [sys.executable, program, "--no-pylint", "run", "--origin", week.pointer.history[2].run]
    done = subprocess.run(command, env=week.environment(), cwd=week.home, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "reproduced, bit for bit" in done.stdout, done.stdout + done.stderr
    assert "the gate on the change of suite.logprob does not hold" in done.stdout


def test_a_pointer_changed_by_hand_stops_the_next_run(week: Retrains, played: dict[str, str]) -> None:
    path = week.home / "store" / "models" / "tiny" / "pointer.json"
    right = path.read_text()
    path.write_text(right.replace('"current": 5', '"current": 3'))
    week.land("2026-03-30.jsonl", 6)
    said = week.run("by hand", fails=True)
    assert "StoreError: the pointer of a promoted model was changed by hand" in said and "Traceback" not in said
    assert "--name tiny --rollback 3 --note WHY" in said and "prepare: running" not in said
    shown = week.promote("--history")
    assert shown.returncode == 1 and "changed by hand" in shown.stderr
    assert week.promote("--rollback", "3", "--note", "answers got worse").returncode == 0
    assert week.decisions[-1] == ("rolled back", 3)
    assert "rolled back" in week.promote("--history").stdout


def shown_in(card: Path) -> str:
    data = re.search(r'__MF_DATA__\["[^"]+"\] = "([A-Za-z0-9+/=]+)"', card.read_text())
    assert data is not None
    return base64.b64decode(data.group(1)).decode()
