"""Models by name against Metaflow's own records: a flow of SFTFlow's name that exports in seconds, run for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOW = ROOT / "tests" / "support" / "exporting_flow.py"
ASK = """
import json, sys
from posttrain_lib.errors import PosttrainError
from steps.start_from import resolve_model
found = {}
for name in json.loads(sys.argv[1]):
    try:
        model = resolve_model(name)
        found[name] = [str(model.path), model.digest, model.lineage]
    except PosttrainError as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def run(home: Path, command: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home),
        "POSTTRAIN_STORE": str(home / "store"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'flows'}",
        **settings,
    }
    return subprocess.run([sys.executable, *command], env=environment, cwd=home, capture_output=True, text=True)


def flow(home: Path, *arguments: str, **settings: str) -> str:
    """The id of a run of the flow, whatever became of it."""
    done = run(home, [str(FLOW), "--no-pylint", *arguments], **settings)
    assert (done.returncode == 0) == ("FAIL_IN" not in settings), done.stdout + done.stderr
    found = re.search(r"run-id (\d+)", done.stdout + done.stderr)
    assert found is not None, done.stdout + done.stderr
    return found[1]


def ask(home: Path, *names: str, **settings: str) -> dict[str, Any]:
    done = run(home, ["-c", ASK, json.dumps(names)], **settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def recorded(home: Path, run_id: str) -> dict[str, Any]:
    """The model section with which a run went on behind its first step."""
    script = (
        "import json, sys; from metaflow import Run, namespace; namespace(None); "
        "print(json.dumps(Run('SFTFlow/' + sys.argv[1])['export'].task.data.run_config['model']))"
    )
    done = run(home, ["-c", script, run_id])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("named")


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, str]:
    """Two runs that went through, of two users, and behind them one that failed in its last step and one in its
    export."""
    return {
        "first": flow(home, "run", "--words", "one", "--tag", "kind:a", "--tag", "kept"),
        "second": flow(home, "run", "--words", "two", "--tag", "kind:a", METAFLOW_USER="other"),
        "gates": flow(home, "run", "--words", "three", "--tag", "kind:b", FAIL_IN="end"),
        "no export": flow(home, "run", "--words", "four", FAIL_IN="export"),
    }


@pytest.fixture(scope="module")
def found(home: Path, runs: dict[str, str]) -> dict[str, Any]:
    """What every name leads to, asked in one process."""
    ids = [f"SFTFlow/{run_id}" for run_id in runs.values()]
    names = ["latest", "tag:kind:a", "tag:kept", "tag:kind:b", "tag:never", f"{runs['first'][:-1]}x"]
    return ask(home, *ids, *(f"SFTFlow/{name}" for name in names), "DPOFlow/latest", "SFTFLow/latest")


def test_a_run_by_its_id(found: dict[str, Any], runs: dict[str, str]) -> None:
    path, digest, lineage = found[f"SFTFlow/{runs['first']}"]
    assert Path(path, "model.safetensors").read_text() == "one"
    key = Path(path).parent.name
    assert lineage == {
        "flow": "SFTFlow", "run": runs["first"], "step": "export", "key": key, "tags": ["kept", "kind:a"]
    }  # fmt: skip
    assert json.loads(Path(path).parent.joinpath("manifest.json").read_text())["outputs"]["hf"]["digest"] == digest


def test_the_latest_that_went_through_of_any_user(found: dict[str, Any], runs: dict[str, str]) -> None:
    for name, expected in (("latest", "second"), ("tag:kind:a", "second"), ("tag:kept", "first")):
        assert found[f"SFTFlow/{name}"][2]["run"] == runs[expected], name


@pytest.mark.parametrize(
    ("run_name", "said"), [("gates", "failed in step end"), ("no export", "failed in step export")]
)
def test_a_run_that_failed_is_refused(found: dict[str, Any], runs: dict[str, str], run_name: str, said: str) -> None:
    answer = found[f"SFTFlow/{runs[run_name]}"]
    assert answer.startswith("ConfigError: the run did not go through") and said in answer


def test_an_id_that_is_none_names_near_and_late_ones(found: dict[str, Any], runs: dict[str, str]) -> None:
    answer = found[f"SFTFlow/{runs['first'][:-1]}x"]
    assert "SFTFlow has no such run" in answer and f"SFTFlow/{runs['first']}" in answer
    for run_id, state in zip(runs.values(), ("successful", "successful", "failed in step end"), strict=False):
        assert f"{run_id} ({state})" in answer


def test_tags_and_flows_that_lead_nowhere(found: dict[str, Any], runs: dict[str, str], home: Path) -> None:
    assert f"{runs['gates']} (failed in step end)" in found["SFTFlow/tag:kind:b"]
    assert "no run of SFTFlow has this tag" in found["SFTFlow/tag:never"]
    assert "one of: kept, kind:a, kind:b" in found["SFTFlow/tag:never"]
    assert "no run of DPOFlow is known here" in found["DPOFlow/latest"] and str(home) in found["DPOFlow/latest"]
    assert "did you mean 'SFTFlow'?" in found["SFTFLow/latest"]


def test_no_records_at_all(tmp_path: Path) -> None:
    answer = ask(tmp_path, "SFTFlow/latest")["SFTFlow/latest"]
    assert "no run of SFTFlow is known here" in answer


@pytest.mark.slow  # a process for each call
def test_promotion_of_runs(home: Path, runs: dict[str, str]) -> None:
    def promote(run_name: str, *more: str) -> subprocess.CompletedProcess[str]:
        return run(home, ["-m", "steps.promote", "--name", "mine", "--from", f"SFTFlow/{runs[run_name]}", *more])

    assert promote("first").returncode == 0
    refused = promote("gates")
    assert refused.returncode == 1 and "the run failed in step end" in refused.stderr
    assert promote("gates", "--force", "only the card failed").returncode == 0
    assert "exported no model" in promote("no export", "--force", "x").stderr
    listed = run(home, ["-m", "steps.promote", "--list"]).stdout.splitlines()
    older, current = (line.split() for line in listed[1:])
    assert older[:2] == ["models/mine@1", f"SFTFlow/{runs['first']}"]
    assert current[:3] == ["models/mine@2", "yes", f"SFTFlow/{runs['gates']}"]
    model = ask(home, "models/mine@1")["models/mine@1"]
    assert model[2]["run"] == runs["first"] and model[2]["promoted"] == "mine@1"


@pytest.mark.slow  # five runs
def test_a_resumed_run_keeps_the_latest_of_when_it_began(home: Path, runs: dict[str, str]) -> None:
    """It stopped in its very first step, just behind the look-up; so did the first resume of it."""
    began = flow(home, "run", "--model", "SFTFlow/latest", "--words", "five", FAIL_IN="start")
    newer = flow(home, "run", "--words", "six")
    again = flow(home, "resume", "--origin-run-id", began, FAIL_IN="start")
    last = flow(home, "resume", "--origin-run-id", again)
    model = recorded(home, last)
    assert model["origin"]["reference"] == "SFTFlow/latest"
    assert model["origin"]["run"] == runs["second"] != newer
    assert Path(model["path"], "model.safetensors").read_text() == "two"
    fresh = flow(home, "run", "--model", "SFTFlow/latest")
    assert recorded(home, fresh)["origin"]["run"] == last


@pytest.mark.slow
def test_a_retried_first_step_keeps_it_too(home: Path, runs: dict[str, str]) -> None:
    """``--with retry``: the second attempt finds what the first one noted."""
    done = run(
        home,
        [str(FLOW), "--no-pylint", "run", "--with", "retry:times=1,minutes_between_retries=0", "--model",
         "SFTFlow/latest"],
        FAIL_ONCE_IN="start",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("(as the run found that began this one)") == 1
