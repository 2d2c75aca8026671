"""What differs between two runs is found where it is, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.lineage.digests import canonical
from posttrain_lib.lineage.kept import keep
from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import StepManifest
from steps.compared_runs import Differences, Side, compare_runs, first_difference, text
from tests.support.exported import publish_run
from tests.support.traced import model_folder, publish_chain, rows_file


@pytest.fixture
def store(isolated_store: Path) -> Store:
    return Store(isolated_store)


@pytest.fixture
def base(store: Store, tmp_path: Path) -> Side:
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    return Side("SFTFlow/1", {"name": "a", "train": {"seed": 0}}, made)


def differing(found: Differences) -> set[str]:
    return {part for part, rows in found.parts.items() if rows}


def changed(side: Side, step: str, **values: Any) -> Side:
    manifests = {**side.manifests, step: dataclasses.replace(side.manifests[step], **values)}
    return dataclasses.replace(side, name="SFTFlow/2", manifests=manifests)


def test_the_same_run(store: Store, base: Side) -> None:
    found = compare_runs(store, base, base)
    assert found.first is None and not differing(found)
    assert "every step is the same work" in text(found, base, base)
    assert "results: the same" in text(found, base, base)


def test_other_rows(store: Store, base: Side, tmp_path: Path) -> None:
    made = publish_chain(store, rows_file(tmp_path / "b", "{}\n"), model_folder(tmp_path / "hf"), run="2")
    found = compare_runs(store, base, dataclasses.replace(base, name="SFTFlow/2", manifests=made))
    assert differing(found) == {"data"}
    assert [row[0] for row in found.parts["data"]] == ["source:a"]
    assert found.first == "inputs: inputs (source:a)"


def test_another_seed(store: Store, base: Side, tmp_path: Path) -> None:
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"), seed=7, run="2")
    other = Side("SFTFlow/2", {"name": "a", "train": {"seed": 7}}, made)
    # The fixture's preparation has its seed from nowhere that a key would show, so train is the first to tell.
    found = compare_runs(store, base, other)
    assert found.first == "train: config (train.seed 0 -> 7)"
    assert found.parts["config"] == [("train.seed", "0", "7")]
    assert "  train.seed  0  7" in text(found, base, other)


def test_results_and_checks_with_their_difference(store: Store, base: Side, tmp_path: Path) -> None:
    arguments = {"run": "2", "passed": False, "loss": 0.5}
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"), **arguments)
    found = compare_runs(store, base, dataclasses.replace(base, manifests=made))
    assert found.parts["results"] == [("train.loss", "1", "0.5  (-0.5)")]
    assert found.parts["checks"] == [("export: logits agree", "passed (0.5)", "FAILED (0.5)")]


def test_a_run_that_went_through_tells_its_summary(store: Store) -> None:
    config = {"name": "a", "recipe": "sft", "model": {"backend": "ours"}}
    a, b = (
        Side(name, config, {step: StepManifest.from_dict(raw) for step, raw in publish_run(exact_match=match).items()})
        for name, match in (("a", 0.5), ("b", 0.75))
    )
    found = compare_runs(store, a, b)
    assert ("exact_match.after", "0.5", "0.75  (+0.25)") in found.parts["results"]


def test_an_interval_is_shown_beside_its_metric(store: Store, base: Side) -> None:
    def rows(mean: float) -> dict[str, Any]:
        after = {"mean": mean, "low": mean - 1, "high": mean + 1, "examples": 9}
        row = {"task": "t", "metric": "m", "group": "all", "after": after}
        return {"held_out_before": {"all": 1.0}, "held_out_after": {"all": 1.0}, "comparison": [row]}

    config = {"name": "a", "recipe": "sft", "model": {"backend": "ours"}}
    made = {step: StepManifest.from_dict(raw) for step, raw in publish_run().items()}
    a, b = (changed(Side("x", config, made), "evaluate", metrics=rows(mean)) for mean in (2.0, 2.5))
    assert compare_runs(store, a, b).parts["results"] == [("t.m of all", "2 [1, 3]", "2.5 [1.5, 3.5]  (+0.5)")]


def test_code_is_told_by_file(store: Store, base: Side) -> None:
    sources = keep(store, canonical({"a.py": "1" * 64, "b.py": "2" * 64}).encode(), "json")
    others = keep(store, canonical({"a.py": "1" * 64, "b.py": "3" * 64, "c.py": "4" * 64}).encode(), "json")
    parts = base.manifests["train"].key_parts
    a = changed(base, "train", key_parts={**parts, "source": sources}, key="a")
    b = changed(base, "train", key_parts={**parts, "source": others}, key="b")
    found = compare_runs(store, a, b)
    assert differing(found) == {"code"}
    assert found.parts["code"] == [("b.py", "2" * 12, "3" * 12), ("c.py", "(none)", "4" * 12)]
    assert first_difference(store, a, b) == "train: source (b.py, c.py)"


def test_code_whose_list_of_files_is_gone_is_told_by_step(store: Store, base: Side) -> None:
    parts = base.manifests["train"].key_parts
    b = changed(base, "train", key_parts={**parts, "source": "9" * 64}, key="b")
    assert ("sources of train", "(none)", "9" * 12) in compare_runs(store, base, b).parts["code"]


def test_commit_and_environment_are_those_of_the_step_done_last(store: Store, base: Side) -> None:
    packages = keep(store, canonical(["torch==1.0"]).encode(), "json")
    late = {"started_at": "2999-01-01T00:00:00+00:00", "environment": {"lock": "l", "packages": packages}}
    a = changed(base, "train", **late, code={"commit": "c" * 40}, hardware={"cpu": "slow"})
    newer = {**late, "environment": {"lock": "l", "packages": keep(store, b'["torch==2.0"]', "json")}}
    b = changed(base, "train", **newer, code={"commit": "d" * 40}, hardware={"cpu": "fast"})
    found = compare_runs(store, a, b)
    assert found.parts["code"] == [("commit", "c" * 12, "d" * 12)]
    assert {row[0]: row[1:] for row in found.parts["environment"]} == {
        "packages": (packages, newer["environment"]["packages"]),  # type: ignore[index]
        "cpu": ("slow", "fast"),
        "package torch": ("1.0", "2.0"),
    }


def test_a_step_that_only_one_has(store: Store, base: Side) -> None:
    kept = {step: manifest for step, manifest in base.manifests.items() if step != "export"}
    shorter = dataclasses.replace(base, name="SFTFlow/2", manifests=kept)
    for pair in ((base, shorter), (shorter, base)):
        assert first_difference(store, *pair) == "export, which only SFTFlow/1 has"


def test_everything_is_plain(store: Store, base: Side, tmp_path: Path) -> None:
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"), seed=7, run="2")
    found = dataclasses.asdict(compare_runs(store, base, dataclasses.replace(base, manifests=made)))
    assert json.loads(json.dumps(found))["first"].startswith("train")
