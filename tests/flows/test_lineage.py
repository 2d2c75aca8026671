"""Lineage of real Metaflow runs: what is recorded of them, shown, compared and kept."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPORTING = ROOT / "tests" / "support" / "exporting_flow.py"
SFT = ROOT / "flows" / "sft_flow.py"
TINY = Path(__file__).with_name("tiny.yaml")
RECORDED = """
import dataclasses, json, sys
from steps.recorded import recorded_run
found = dataclasses.asdict(recorded_run(sys.argv[1]))
print(json.dumps(found, default=str))
"""


def run(home: Path, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "METAFLOW_USER": "tester",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home),
        "POSTTRAIN_STORE": str(home / "store"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'flows'}",
        **settings,
    }
    return subprocess.run([sys.executable, *command], env=environment, cwd=home, capture_output=True, text=True)


def flow(home: Path, *arguments: str, file: Path = EXPORTING, **settings: str) -> str:
    """The id of a run, whatever became of it."""
    done = run(home, str(file), "--no-pylint", *arguments, **settings)
    assert (done.returncode == 0) == ("FAIL_IN" not in settings), done.stdout + done.stderr
    found = re.search(r"run-id (\d+)", done.stdout + done.stderr)
    assert found is not None, done.stdout + done.stderr
    return found[1]


def lineage(home: Path, *arguments: str, module: str = "steps.lineage") -> str:
    done = run(home, "-m", module, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recorded(home: Path, name: str) -> dict[str, Any]:
    done = run(home, "-c", RECORDED, name)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lineage")


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, str]:
    """Two that went through, the first with a tag; one that failed in its end; one that resumed that."""
    found = {
        "first": flow(home, "run", "--words", "one", "--tag", "kept"),
        "second": flow(home, "run", "--words", "two"),
    }
    found["failed"] = flow(home, "run", "--words", "three", FAIL_IN="export")
    found["resumed"] = flow(home, "resume", "--origin-run-id", found["failed"])
    found["reused"] = flow(home, "run", "--words", "one")
    return found


def test_what_is_recorded_of_a_run(home: Path, runs: dict[str, str]) -> None:
    found = recorded(home, f"SFTFlow/{runs['first']}")
    assert (found["flow"], found["run"], found["state"], found["tags"]) == (
        "SFTFlow",
        runs["first"],
        "successful",
        ["kept"],
    )
    assert found["config"]["train"]["row_tokens"] == 64
    assert list(found["manifests"]) == ["train", "evaluate", "export"]
    made_by = {"flow": "SFTFlow", "run": runs["first"], "step": "export", "user": "tester", "origin": None}
    assert all(manifest["made_by"] == made_by for manifest in found["manifests"].values())
    assert found["hardware"]["cores"] == str(os.cpu_count()) and found["environment"]["lock"]
    if found["code"]["patch"] is not None:
        assert Path(found["code"]["patch_file"]).is_file()


def test_a_resumed_run_names_its_origin_and_a_reused_result_its_maker(home: Path, runs: dict[str, str]) -> None:
    resumed = recorded(home, f"SFTFlow/{runs['resumed']}")["manifests"]["export"]["made_by"]
    assert (resumed["run"], resumed["origin"]) == (runs["resumed"], runs["failed"])
    reused = recorded(home, f"SFTFlow/{runs['reused']}")["manifests"]["export"]
    assert reused["reused"] and reused["made_by"]["run"] == runs["first"]


def test_a_run_without_any_result(home: Path, runs: dict[str, str]) -> None:
    done = run(home, "-m", "steps.lineage", "show", f"SFTFlow/{runs['failed']}")
    assert done.returncode == 1 and "no step of the run left a result" in done.stderr
    assert "failed in step export" in done.stderr and "Traceback" not in done.stderr


def test_show_and_diff(home: Path, runs: dict[str, str]) -> None:
    shown = lineage(home, "show", f"SFTFlow/{runs['first']}")
    assert shown.startswith(f"SFTFlow/{runs['first']}  test  successful  #kept")
    assert "export v1 " in shown and "not as it was" not in shown
    same = lineage(home, "diff", f"SFTFlow/{runs['first']}", f"SFTFlow/{runs['reused']}")
    assert "none, every step is the same work" in same
    other = lineage(home, "diff", f"SFTFlow/{runs['first']}", f"SFTFlow/{runs['second']}")
    assert "first step that differs: train: config" in other


def test_promoted_models_differ_as_the_runs_that_made_them(home: Path, runs: dict[str, str]) -> None:
    names = [f"SFTFlow/{runs[which]}" for which in ("first", "second")]
    for name in names:
        lineage(home, "--name", "mine", "--from", name, module="steps.promote")
    of_runs, of_models = lineage(home, "diff", *names), lineage(home, "diff", "models/mine@1", "models/mine@2")
    assert of_models.splitlines()[:2] == ["a  models/mine@1", "b  models/mine@2"]
    assert of_models.splitlines()[2:] == of_runs.splitlines()[2:] and "\nresults: " in of_runs


def test_metaflow_s_copy_of_a_manifest_is_checked_too(home: Path, runs: dict[str, str]) -> None:
    script = (
        "import sys; from posttrain_lib.adapters import metaflow_runs as m; from steps import recorded\n"
        "found = m.run_by_id('SFTFlow', sys.argv[1], where='x')\n"
        "found.manifests['train']['seconds'] += 1\n"
        "m.run_by_id = lambda *_, **__: found\n"
        "recorded.recorded_run('SFTFlow/' + sys.argv[1])"
    )
    done = run(home, "-c", script, runs["first"])
    assert "the manifest was changed after it was published" in done.stderr
    assert f"Metaflow's record of SFTFlow/{runs['first']}, step train" in done.stderr
    assert "python -m steps.lineage show train/" in done.stderr


def test_a_run_that_metaflow_has_no_record_of_is_shown_from_the_store(
    home: Path, runs: dict[str, str], tmp_path: Path
) -> None:
    lost = {"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path)}
    shown = run(home, "-m", "steps.lineage", "show", f"SFTFlow/{runs['second']}", **lost).stdout.splitlines()
    assert shown[0].endswith("of which the store has what it made itself, and Metaflow no record")
    assert {line.split()[0] for line in shown[1:]} == {"train", "evaluate", "export"}
    never = run(home, "-m", "steps.lineage", "show", "SFTFlow/1", **lost)
    assert never.returncode == 1 and "no run of SFTFlow is known here" in never.stderr


@pytest.mark.slow  # takes away what the others look at, and so has runs of its own
def test_the_clean_up_keeps_what_a_tag_holds(tmp_path: Path) -> None:
    kept, other = flow(tmp_path, "run", "--words", "one", "--tag", "kept"), flow(tmp_path, "run", "--words", "two")
    for manifest in (tmp_path / "store").glob("steps/*/*/manifest.json"):
        os.utime(manifest, (1, 1))
    said = lineage(tmp_path, "clean", "--remove", module="steps.store")
    assert "1 tagged runs" in said and said.count(f"kept (for SFTFlow/{kept}, tagged kept)") == 3
    assert "not as it was" not in lineage(tmp_path, "show", f"SFTFlow/{kept}")
    gone, again = lineage(tmp_path, "show", f"SFTFlow/{other}"), "python flows/sft_flow.py resume start --origin-run-id"
    assert gone.count("[GONE]") == 3
    assert f"can be made again, all that it was made of is there: {again} {other}" in gone


@pytest.mark.slow  # two whole runs
@pytest.mark.timeout(900)
def test_from_an_export_back_to_the_rows_over_two_real_runs(tmp_path: Path) -> None:
    """Step by step, with the card; the second run begins with the model of the first."""
    config = ["--config", str(TINY)]
    first = flow(tmp_path, *config, "run", "--tag", "base", file=SFT)
    more = "model.from_scratch=null,model.path=SFTFlow/tag:base,train.seed=3"
    second = flow(tmp_path, *config, "run", "--set", more, file=SFT)
    found = recorded(tmp_path, f"SFTFlow/{second}")
    (export,) = (tmp_path / "store" / "steps" / "export").glob(f"{Path(found['inputs']['model']['uri']).parent.name}")
    assert json.loads((export / "manifest.json").read_text())["made_by"]["run"] == first
    lines = lineage(tmp_path, "show", f"SFTFlow/{second}").splitlines()
    assert any(line.startswith("|- model, tokenizer <- export v1") and f"SFTFlow/{first}" in line for line in lines)
    assert any("source:generated" in line and "inputs v1" in line and f"SFTFlow/{first}" in line for line in lines)
    assert not any("not as it was" in line for line in lines)
    by_folder = lineage(tmp_path, "show", str(export / "hf")).splitlines()
    assert by_folder[1].startswith("export v1") and f"SFTFlow/{first}" in by_folder[1]
    compared = lineage(tmp_path, "diff", f"SFTFlow/{first}", f"SFTFlow/{second}")
    assert "first step that differs: inputs: config (model.path null ->" in compared
    assert re.search(r"train\.seed +0 +3", compared) and "held_out_after" in compared
    card = tmp_path / "report.html"
    done = run(tmp_path, str(SFT), "--no-pylint", "card", "get", f"{second}/end", str(card), "--id", "report")
    assert done.returncode == 0, done.stdout + done.stderr
    assert lineage_picture(card).count("<rect ") == len({*re.findall(r"\w+ v\d [0-9a-f]{12}", "\n".join(lines))})


def lineage_picture(card: Path) -> str:
    data = re.search(r'__MF_DATA__\["[^"]+"\] = "([A-Za-z0-9+/=]+)"', card.read_text())
    assert data is not None
    found = re.search(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", base64.b64decode(data[1]).decode())
    assert found is not None
    return base64.b64decode(found[1]).decode()
