"""The comparison of a run with itself done again: what is equal, what is noise, which step differs first and why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.lineage.store import Store
from posttrain_lib.schema.manifests import ArtifactRef, Check, StepManifest
from steps.reproduced import Step, as_text, compare, first_difference, unmeasured, verdict
from tests.support.traced import model_folder, publish_chain, rows_file

LIMIT = 1e-4
Run = dict[str, StepManifest]


@pytest.fixture
def store(isolated_store: Path) -> Store:
    return Store(isolated_store)


@pytest.fixture
def origin(store: Store, tmp_path: Path) -> Run:
    made = publish_chain(store, rows_file(tmp_path), model_folder(tmp_path / "hf"))
    gate = dataclasses.replace(
        made["export"], step="convert_model", outputs={}, checks=(Check("logits, float32", True, 1e-5, LIMIT),)
    )
    return {**made, "convert_model": gate}


def other(run: Run, step: str, **values: Any) -> Run:
    return {**run, step: dataclasses.replace(run[step], **values)}


def other_output(run: Run, step: str, name: str) -> Run:
    ref = dataclasses.replace(run[step].outputs[name], digest="f" * 64)
    return other(run, step, outputs={**run[step].outputs, name: ref})


def compared(store: Store, origin: Run, made: Run) -> dict[str, Step]:
    return {step.name: step for step in compare(origin, made, store, precision="fp32")}


def verdicts(steps: dict[str, Step]) -> set[str]:
    return {step.verdict for step in steps.values()}


def with_losses(run: Run, folder: Path, losses: list[float], seconds: float = 1.0) -> Run:
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.jsonl"
    reports = [
        {
            "step": number,
            "loss": loss,
            "held_out": None,
            "step_seconds": seconds,
            "figures": {"time/x": seconds, "y": 2},
        }
        for number, loss in enumerate(losses, 1)
    ]
    path.write_text("".join(json.dumps(report) + "\n" for report in reports))
    digest = f"{abs(hash((tuple(losses), seconds))):064x}"
    return other(run, "train", outputs={"metrics": ArtifactRef(str(path), "metrics", digest)})


def test_the_same_again(store: Store, origin: Run, tmp_path: Path) -> None:
    again = publish_chain(Store(tmp_path / "second"), rows_file(tmp_path), model_folder(tmp_path / "hf"))
    steps = compared(store, {name: origin[name] for name in again}, again)
    assert verdicts(steps) == {"equal"}
    assert verdict(list(steps.values())) == "reproduced, bit for bit"
    assert steps["inputs"].what == "2 of 2 results equal"


def test_times_are_not_results(store: Store, origin: Run, tmp_path: Path) -> None:
    one = with_losses(origin, tmp_path / "a", [2.0, 1.0], seconds=1.0)
    two = with_losses(origin, tmp_path / "b", [2.0, 1.0], seconds=3.0)
    assert verdicts(compared(store, one, two)) == {"equal"}


def test_what_is_measured_is_left_out_at_every_depth() -> None:
    report = {"loss": 1.0, "step_seconds": 2.0, "seconds": {"data": 1.0}, "mfu": 0.1, "mfu_measured": None}
    report |= {"figures": {"idle/policy": 0.1, "reward/mean": 1.0}, "seconds_of_step": 3, "peak_memory_gib": 1.0}
    assert unmeasured({"report": report}) == {
        "report": {"loss": 1.0, "figures": {"reward/mean": 1.0}, "seconds_of_step": 3}
    }


def test_checkpoints_are_compared_by_all_but_their_times(store: Store, origin: Run, tmp_path: Path) -> None:
    def saved(name: str, seconds: float, weights: str) -> Run:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tensors-0.bin").write_text(weights)
        (folder / "state.json").write_text(json.dumps({"report": {"loss": 1.0, "step_seconds": seconds}}))
        (folder / "manifest.json").write_text(json.dumps({"files": seconds}))
        return other(origin, "train", outputs={"last": ArtifactRef(str(folder), "checkpoint", f"{name:0>64}")})

    one = saved("a", 1.0, "weights")
    assert verdicts(compared(store, one, saved("b", 2.0, "weights"))) == {"equal"}
    assert compared(store, one, saved("c", 1.0, "others"))["train"].verdict == "differs"


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ({"folder": "a", "difference": 1.0}, {"folder": "b", "difference": 1.0}, "equal"),
        ({"folder": "a", "difference": 1.0}, {"folder": "a", "difference": 2.0}, "differs"),
        ([{"name": "greedy", "value": 1.0}], [{"name": "greedy", "value": 2.0}], "differs"),
    ],
)
def test_reports_of_checks_are_compared_but_for_the_place(
    store: Store, origin: Run, tmp_path: Path, before: Any, after: Any, wanted: str
) -> None:
    runs = []
    for name, found in (("a", before), ("b", after)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(found))
        ref = ArtifactRef(str(path), "verification", f"{name:0>64}")
        runs.append(other(origin, "export", outputs={"verification": ref}))
    assert compared(store, *runs)["export"].verdict == wanted


def test_nondeterminism_is_what_is_left(store: Store, origin: Run) -> None:
    steps = compared(store, origin, other_output(other_output(origin, "export", "hf"), "prepare_data", "train"))
    first = first_difference(list(steps.values()))
    assert first is not None and first.name == "prepare_data" and "others: train" in first.what
    assert first.causes[0].startswith("nondeterminism: ")
    assert verdict(list(steps.values())).startswith("NOT reproduced: the first step that differs is prepare_data")


@pytest.mark.parametrize("steps", [(2, 4), (4, 2)], ids=["further than then", "not as far"])
def test_a_run_of_another_length_is_no_noise(store: Store, origin: Run, tmp_path: Path, steps: tuple[int, int]) -> None:
    """As by early stopping, or an incident whose step has no loss: what both have agrees to the last bit."""
    one, two = (with_losses(origin, tmp_path / str(many), [2.0] * many) for many in steps)
    found = compared(store, one, other(two, "train", hardware={"machine": "another"}))["train"]
    assert found.verdict == "differs" and "losses that only one has: step 3 loss, step 4 loss" in found.what


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"hardware": {"machine": "another"}}, "hardware: machine "),
        ({"environment": {"lock": "x", "torch": "9"}}, "environment: "),
        ({"key_parts": {"source": "0" * 64}}, "code: "),
        ({"config": {"train": {"seed": 5, "loss": 1.0}}}, "config: train.seed 0 -> 5"),
        ({"inputs": {"train": ArtifactRef("x", "tokens", "a" * 64)}}, "data: train "),
    ],
)
def test_causes(store: Store, origin: Run, tmp_path: Path, values: dict[str, Any], cause: str) -> None:
    one = with_losses(origin, tmp_path / "a", [2.0])
    made = other(with_losses(origin, tmp_path / "b", [3.0]), "train", **values)
    found = compared(store, one, made)["train"]
    assert found.verdict == "differs" and any(each.startswith(cause) for each in found.causes), found.causes
    assert found.largest == 1.0 and "first loss that differs: step 1 loss, 2.0 -> 3.0" in found.what


def test_noise_needs_another_ground_and_grows_with_the_updates(store: Store, origin: Run, tmp_path: Path) -> None:
    allowed = 2 * LIMIT * 4  # of the third update
    one = with_losses(origin, tmp_path / "a", [2.0, 2.0, 2.0])
    near = with_losses(origin, tmp_path / "b", [2.0, 2.0, 2.0 + 0.9 * allowed])
    moved = other(near, "train", hardware={"cpu": "another"})
    found = compared(store, one, moved)
    assert found["train"].verdict == "within noise"
    assert verdict(list(found.values())) == "reproduced, within the recorded noise in train, else bit for bit"
    assert compared(store, one, near)["train"].verdict == "differs", "on the same hardware bits are asked for"
    far = with_losses(origin, tmp_path / "c", [2.0, 2.0, 2.0 + 1.1 * allowed])
    assert compared(store, one, other(far, "train", hardware={"cpu": "another"}))["train"].verdict == "differs"
    early = with_losses(origin, tmp_path / "d", [2.0 + 0.9 * allowed, 2.0, 2.0])
    assert compared(store, one, other(early, "train", hardware={"cpu": "another"}))["train"].verdict == "differs"


def test_noise_is_never_more_than_a_hundredth_of_a_loss(store: Store, origin: Run, tmp_path: Path) -> None:
    coarse = other(origin, "convert_model", checks=(Check("logits, float32", True, 0.1, 0.1),))
    one = with_losses(coarse, tmp_path / "a", [2.0])
    found = {}
    for name, loss in (("near", 2.0 * 1.009), ("far", 2.0 * 1.011)):
        made = other(with_losses(coarse, tmp_path / name, [loss]), "train", hardware={"cpu": "another"})
        found[name] = compared(store, one, made)["train"].verdict
    assert found == {"near": "within noise", "far": "differs"}


def test_what_follows_from_a_difference_is_no_noise(store: Store, origin: Run, tmp_path: Path) -> None:
    one = with_losses(origin, tmp_path / "a", [2.0])
    made = other_output(with_losses(origin, tmp_path / "b", [3.0]), "export", "hf")
    found = compared(store, one, other(made, "export", hardware={"cpu": "another"}))
    assert found["export"].verdict == "differs" and found["export"].causes[0] == "follows from train"


def test_data_has_no_noise(store: Store, origin: Run) -> None:
    made = other(other_output(origin, "prepare_data", "train"), "prepare_data", hardware={"cpu": "another"})
    assert compared(store, origin, made)["prepare_data"].verdict == "differs"


def test_a_check_that_comes_out_otherwise_is_no_noise(store: Store, origin: Run) -> None:
    failed = other(origin, "export", checks=(Check("logits agree", False, 2.0, 1.0),), hardware={"cpu": "another"})
    found = compared(store, origin, failed)["export"]
    assert found.verdict == "differs" and "check 'logits agree'" in found.what


def test_a_step_that_was_not_reached_says_why_once(store: Store, origin: Run) -> None:
    made = {"inputs": origin["inputs"]}
    steps = compare(origin, made, store, precision="fp32", stopped="DataError: no rows")
    assert [step.verdict for step in steps[:3]] == ["equal", "not reached", "not reached"]
    assert steps[1].causes == ("DataError: no rows",) and steps[2].causes == ()
    assert "DataError: no rows" in as_text(steps)


def test_what_is_gone_cannot_be_compared_and_is_named(store: Store, origin: Run, tmp_path: Path) -> None:
    one = with_losses(origin, tmp_path / "a", [2.0])
    two = with_losses(origin, tmp_path / "b", [2.0], seconds=2.0)
    (tmp_path / "a" / "metrics.jsonl").unlink()
    found = compared(store, one, two)["train"]
    assert found.verdict == "equal" and found.what == "0 of 1 results equal; gone or damaged, so not compared: metrics"
    assert verdict([found]) == "reproduced, bit for bit; gone or damaged, so not compared: train metrics"
