"""The plan of a reproduction: inputs in their places, each looked at; code and environment as they were."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.sources import digest_rows
from posttrain_lib.errors import ConfigError, VerificationError
from posttrain_lib.lineage.digests import FileDigests, digest_file
from posttrain_lib.lineage.environment import describe_hardware, environment_digest
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import ArtifactRef
from steps import reproduce
from steps.recorded import Code, Recorded, from_outside
from steps.reproduce_inputs import check_inputs, parse_moved, with_inputs
from tests.support.exported import RAW
from tests.support.launched import wait_for
from tests.support.traced import model_folder, publish_chain, rows_file


@pytest.fixture
def store(isolated_store: Path) -> Store:
    return Store(isolated_store)


@pytest.fixture
def recorded(store: Store, tmp_path: Path) -> Recorded:
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    return Recorded(
        flow="SFTFlow",
        run="1",
        state="successful",
        tags=(),
        config=build_run_config(RAW).model_dump(mode="json"),
        manifests=made,
        code=Code(None, None, None, "the commit"),
        environment={"lock": environment_digest()},
        hardware=describe_hardware(),
        inputs=from_outside(made),
    )


def test_inputs_by_their_recorded_places(recorded: Recorded, tmp_path: Path) -> None:
    config = with_inputs(recorded, {})
    assert recorded.config["data"]["sources"][0]["path"] == "rows.jsonl", "as the run file said it, and still does"
    assert config["data"]["sources"][0]["path"] == str(tmp_path / "rows.jsonl")
    assert config["model"]["path"] == str(tmp_path / "hf")
    assert with_inputs(recorded, {"model": "elsewhere"})["model"]["path"] == "elsewhere"
    build_run_config(config)


def test_every_kind_of_input_has_its_place(recorded: Recorded) -> None:
    source = {"name": "a", "path": "x"}
    origin = {"flow": "SFTFlow", "run": "7", "path": "m"}
    config: dict[str, Any] = {
        "data": {"sources": [dict(source)], "tokenizer": "t", "chat_template": "c"},
        "model": {"path": "m", "origin": origin, "from_scratch": {"tokenizer": "s"}},
        "train": {"checkpoint": {"folder": "memory://runs"}},
        "tracking": [{"name": "wandb"}],
        "grpo": {
            "reference": {"path": "r", "origin": None},
            "teacher": None,
            "rewards": [
                {"name": "exact", "title": None, "options": {}},
                {"name": "model", "title": "taste", "options": {"folder": "j"}},
                {"name": "own.module:judge", "title": None, "options": {"words": "w"}},
            ],
            "warm_start": {
                "data": {"sources": [dict(source)], "chat_template": "w"},
                "train": {"checkpoint": {"folder": "memory://warm"}},
            },
        },
        "evaluation": {"tasks": [{"task": "choices", "options": {"path": "task.jsonl"}}]},
    }
    names = (
        "source:a", "warm_start.source:a", "model", "companion", "tokenizer", "chat_template", "scratch_tokenizer",
        "warm_start:chat_template", "grader:taste:folder", "grader:judge:words",
    )  # fmt: skip
    inputs = {name: ArtifactRef(f"new {name}", "x", "0" * 64) for name in names}
    inputs["task:choices:0"] = ArtifactRef("task.jsonl", "rows", "0" * 64)
    moved = {"model": "moved model", "task:choices:0": "moved task"}
    found = with_inputs(dataclasses.replace(recorded, config=config, inputs=inputs), moved)
    assert found["data"]["sources"][0]["path"] == "new source:a"
    assert found["grpo"]["warm_start"]["data"]["sources"][0]["path"] == "new warm_start.source:a"
    assert found["grpo"]["warm_start"]["data"]["chat_template"] == "new warm_start:chat_template"
    assert (found["model"]["path"], found["model"]["origin"]) == ("moved model", None)
    assert found["grpo"]["reference"]["path"] == "new companion" and found["grpo"]["teacher"] is None
    assert [term["options"] for term in found["grpo"]["rewards"]] == [
        {}, {"folder": "new grader:taste:folder"}, {"words": "new grader:judge:words"}
    ]  # fmt: skip
    assert (found["data"]["tokenizer"], found["data"]["chat_template"]) == ("new tokenizer", "new chat_template")
    assert found["model"]["from_scratch"]["tokenizer"] == "new scratch_tokenizer"
    assert found["evaluation"]["tasks"][0]["options"]["path"] == "moved task"
    trained = (found["train"], found["grpo"]["warm_start"]["train"])
    assert [each["checkpoint"]["folder"] for each in trained] == [None, None], "nothing to go on from"
    assert found["tracking"] == []


def test_inputs_that_are_there(recorded: Recorded, tmp_path: Path) -> None:
    check_inputs(recorded, {})
    shutil.move(tmp_path / "hf", tmp_path / "moved")
    check_inputs(recorded, {"model": str(tmp_path / "moved")})
    (tmp_path / "moved" / "model.safetensors").write_text("others")
    with pytest.raises(ConfigError, match="not the input that the run had"):
        check_inputs(recorded, {"model": str(tmp_path / "moved")})


def test_inputs_that_are_gone_or_changed_are_all_named(recorded: Recorded, store: Store, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    shutil.rmtree(store.root / "steps" / "train")
    with pytest.raises(ConfigError, match="cannot be reproduced without its inputs") as error:
        check_inputs(recorded, {})
    said = str(error.value)
    assert "hf: gone; it was digest" in said and "rows.jsonl: changed: its digest is" in said
    assert "--input source:a=PATH, model=PATH" in said
    assert "still in the store, whole: inputs, prepare_data, export" in said


def test_the_run_that_exported_a_model_is_named(recorded: Recorded, store: Store) -> None:
    place = store.result_folder("export", "a" * 64) / "hf"
    model = dict(recorded.config["model"], path=str(place), origin={"flow": "SFTFlow", "run": "7"})
    lost = dataclasses.replace(
        recorded,
        config={**recorded.config, "model": model},
        inputs={"model": ArtifactRef(str(place), "model", "0" * 64)},
    )
    with pytest.raises(ConfigError) as error:
        check_inputs(lost, {})
    assert "the export of SFTFlow/7: flows/reproduce_flow.py run --keep true --origin SFTFlow/7" in str(error.value)


@pytest.mark.parametrize("text", ["rows=x", "model", "model="])
def test_moved_inputs_must_be_some(recorded: Recorded, text: str) -> None:
    with pytest.raises(ConfigError, match="gives no input of the run"):
        parse_moved(text, recorded)
    assert parse_moved("model=a, source:a=b=c,", recorded) == {"model": "a", "source:a": "b=c"}


def test_equal_sources_run_from_this_checkout(recorded: Recorded, tmp_path: Path) -> None:
    plan = reproduce.make_plan(recorded, tmp_path / "again")
    assert plan.root == PROJECT_ROOT and plan.lacks == () and plan.accelerator is None


def with_lock(recorded: Recorded, lock: str) -> Recorded:
    return dataclasses.replace(recorded, environment={"lock": lock})


def test_another_environment_than_this_one(recorded: Recorded, tmp_path: Path) -> None:
    plan = reproduce.make_plan(with_lock(recorded, "e" * 64), tmp_path / "again", environment="here")
    assert plan.lacks == (f"environment: lock {environment_digest()[:12]} instead of {'e' * 12}",)


def checkout_with_lock(folder: Path, text: str) -> Path:
    """The parts of a checkout that make its environment."""
    shutil.copytree(PROJECT_ROOT / "infra", folder / "infra", ignore=shutil.ignore_patterns("locks"))
    (folder / "infra" / "locks").mkdir()
    lock = folder / "infra" / "locks" / "cpu.txt"
    lock.write_text(text)
    return lock


def test_a_lock_that_does_not_resolve_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = checkout_with_lock(tmp_path / "code", "pip==0.0.1\nsetuptools==0.0.1\nwheel==0.0.1\ntorch==0.0.1\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match="lock does not resolve any more") as error:
        reproduce._made_environment(digest_file(lock), tmp_path / "code")
    assert "No matching distribution found for pip==0.0.1" in str(error.value) and "cpu.txt" in str(error.value)
    assert "--environment here" in str(error.value)


def test_this_checkout_s_environment_is_not_made_again(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keeps its own environment") as error:
        reproduce.make_plan(with_lock(recorded, "e" * 64), tmp_path / "again", code="here")
    assert "--environment here" in str(error.value)


def test_code_that_is_nowhere(recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain_lib.adapters import metaflow_code

    monkeypatch.setattr(metaflow_code, "unpack_code", lambda *_: False)
    lost = dataclasses.replace(recorded, code=Code("0" * 40, None, None, ""))
    with pytest.raises(ConfigError, match="code cannot be had again") as error:
        reproduce.make_plan(with_lock(lost, "e" * 64), tmp_path / "again")
    assert "which git does not have here" in str(error.value) and "--code here" in str(error.value)


def test_a_lock_that_the_code_does_not_have(tmp_path: Path) -> None:
    checkout_with_lock(tmp_path / "code", "torch==1\n")
    with pytest.raises(ConfigError, match="its lock is not in its code"):
        reproduce._made_environment("e" * 64, tmp_path / "code")


def test_a_report_that_fails_names_step_cause_and_place(recorded: Recorded, store: Store, tmp_path: Path) -> None:
    plan = reproduce.make_plan(recorded, store.root / "tmp" / "again")
    (plan.folder / "store").mkdir(parents=True)
    ref = dataclasses.replace(recorded.manifests["export"].outputs["hf"], digest="0" * 64)
    export = dataclasses.replace(recorded.manifests["export"], outputs={"hf": ref})
    made = reproduce.Reproduction("SFTFlow/2", {**recorded.manifests, "export": export}, 1.0, None)
    report = reproduce.report(plan, made)
    reproduce.clear_away(plan, report, keep=False)
    assert plan.folder.is_dir(), "to be looked at"
    with pytest.raises(VerificationError, match="does not reproduce") as error:
        reproduce.check(report)
    assert (
        "step export" in str(error.value)
        and "nondeterminism" in str(error.value)
        and str(plan.folder) in str(error.value)
    )
    same = reproduce.report(plan, dataclasses.replace(made, manifests=recorded.manifests))
    reproduce.check(same)
    reproduce.clear_away(plan, same, keep=True)
    assert plan.folder.is_dir()
    (plan.folder / "store" / "written last").touch()  # the folder itself was last changed before
    os.utime(plan.folder, (0, 0))
    reproduce.clear_away(plan, same, keep=False)
    assert not plan.folder.exists()


def test_rows_have_the_digest_of_their_names_and_contents(recorded: Recorded, tmp_path: Path) -> None:
    """What is given as moved must be the same rows by name, too: the order of reading goes by it."""
    again = rows_file(tmp_path / "other", name="rows.jsonl")
    assert digest_rows(str(again), FileDigests()) == recorded.inputs["source:a"].digest
    check_inputs(recorded, {"source:a": str(again)})


#: starts a process of its own and says its number; "deaf" does not hear that it shall stop
RUNS = """
import signal, subprocess, sys, time
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("hears", ["hears", "deaf"])
def test_a_run_whose_watcher_is_stopped_ends_with_all_its_processes(
    hears: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "_GRACE_SECONDS", 0.5)
    children: list[int] = []

    def stop(line: str) -> None:
        children.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce._watched([sys.executable, "-c", RUNS, hears], dict(os.environ), stop)
    wait_for(lambda: not alive(children[0]), 120, "the end of the run's own process")


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
