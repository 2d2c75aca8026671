"""The step runner: same work once, a reason when it is done again, nothing half-done left behind."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import build_run_config
from posttrain_lib.config.train import Incidents
from posttrain_lib.errors import DataError, StoreError
from posttrain_lib.lineage.graph import HERE, Raw, trace
from posttrain_lib.lineage.kept import packages_of, sources_of
from posttrain_lib.lineage.source_digest import source_digests
from posttrain_lib.lineage.store import MANIFEST, Store, check_manifest
from posttrain_lib.schema.manifests import ArtifactRef, MadeBy, StepManifest
from steps import base, train
from steps.base import Manifests, Step, StepContext, StepResult, content_key, results_of, run_step

RAW: dict[str, Any] = {
    "name": "test",
    "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 64},
    "model": {"path": "folder"},
    "train": {"steps": 10, "row_tokens": 64},
}


class Recorder:
    """A step whose body counts its runs and writes one file."""

    def __init__(self) -> None:
        self.runs = 0
        self.fail: Exception | None = None

    def step(self, version: int = 1) -> Step:
        def body(context: StepContext) -> StepResult:
            self.runs += 1
            context.work.mkdir(parents=True, exist_ok=True)
            (context.work / "progress").write_text("kept")
            (context.out / "result.txt").write_text(str(context.config.train.steps))
            if self.fail is not None:
                raise self.fail
            return StepResult({"result": ("result.txt", "text")}, summary="all good")

        return Step(
            "fake",
            version,
            "posttrain_lib.errors",
            lambda config: config.train.model_dump(mode="json"),
            lambda config, manifests: {"data": ArtifactRef("somewhere", "rows", "d1")},
            body,
        )


@pytest.fixture
def config() -> RunConfig:
    return build_run_config(RAW)


def run(step: Step, config: RunConfig, store: Store, **options: Any) -> tuple[StepManifest, list[str]]:
    said: list[str] = []
    return run_step(step, config, {}, store=store, say=said.append, **options), said


def test_same_work_is_done_once_and_said(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    first, said_first = run(recorder.step(), config, store)
    second, said_second = run(recorder.step(), config, store)
    assert recorder.runs == 1
    assert second == dataclasses.replace(first, reused=True)
    assert "no earlier result" in said_first[0]
    assert "reused" in said_second[0]
    assert Path(first.outputs["result"].uri).read_text() == "10"


def test_an_unrelated_section_does_not_matter(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    run(recorder.step(), config, store)
    run(recorder.step(), build_run_config(RAW, overrides=["evaluation.samples=1", "name=other"]), store)
    assert recorder.runs == 1


@pytest.mark.parametrize("what", ["config", "version"])
def test_a_change_is_named(tmp_path: Path, config: RunConfig, what: str) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    run(recorder.step(), config, store)
    changed = build_run_config(RAW, overrides=["train.steps=11"]) if what == "config" else config
    _, said = run(recorder.step(version=2 if what == "version" else 1), changed, store)
    assert recorder.runs == 2
    assert f"{what} changed since" in said[0]
    assert what == "version" or "steps 10 -> 11" in said[0]


@pytest.mark.parametrize(
    ("flow", "like"), [("SFTFlow", "SFTFlow"), ("RetrainFlow", "RetrainFlow"), ("DPOFlow", "RetrainFlow")]
)
def test_a_change_is_told_since_the_last_result_of_the_same_flow(
    tmp_path: Path, config: RunConfig, flow: str, like: str
) -> None:
    """Or of any, where that flow has none."""
    recorder, store, steps = Recorder(), Store(tmp_path), {"SFTFlow": 11, "RetrainFlow": 12}
    for number, earlier in enumerate(steps):
        with results_of(MadeBy(earlier, "1", "fake", "tester")):
            made, _ = run(recorder.step(), build_run_config(RAW, overrides=[f"train.steps={steps[earlier]}"]), store)
        os.utime(store.result_folder("fake", made.key) / MANIFEST, (number, number))
    with results_of(MadeBy(flow, "2", "fake", "tester")):
        _, said = run(recorder.step(), config, store)
    assert f" of {like}/1 (steps {steps[like]} -> 10)" in said[0]


def test_reuse_can_be_turned_off(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    run(recorder.step(), config, store)
    manifest, said = run(recorder.step(), config, store, reuse=False)
    assert recorder.runs == 2
    assert "reuse is off" in said[0]
    assert store.find("fake", manifest.key) is not None


def chained(name: str, before: str | None = None) -> Step:
    """A step that writes a file, or reads that of the step ``before``."""

    def body(context: StepContext) -> StepResult:
        text = name if before is None else f"{Path(context.inputs['in'].uri).read_text()} {name}"
        (context.out / "text").write_text(text)
        return StepResult({"text": ("text", "text")})

    def inputs(_: RunConfig, manifests: Manifests) -> dict[str, ArtifactRef]:
        return {} if before is None else {"in": manifests[before].outputs["text"]}

    return Step(name, 1, "posttrain_lib.errors", lambda _: {}, inputs, body)


@pytest.mark.parametrize("original_stays", [False, True])
def test_results_are_used_where_the_store_is_now(tmp_path: Path, config: RunConfig, original_stays: bool) -> None:
    """Moved, as to a larger disk, or copied."""
    before, now = Store(tmp_path / "before"), Store(tmp_path / "now")
    first = run_step(chained("first"), config, {}, store=before)
    run_step(chained("second", "first"), config, {"first": first}, store=before)
    shutil.copytree(before.root, now.root)
    if not original_stays:
        shutil.rmtree(before.root)
    first = run_step(chained("first"), config, {}, store=now)
    second = run_step(chained("second", "first"), config, {"first": first}, store=now)
    third = run_step(chained("third", "second"), config, {"second": second}, store=now)
    assert first.reused and second.reused
    assert Path(third.outputs["text"].uri).read_text() == "first second third"
    assert {Path(made.outputs["text"].uri).is_relative_to(now.root) for made in (first, second, third)} == {True}
    check_manifest(second, "memory")
    shown = trace(now, [first, second, third], lambda *_: Raw(HERE))
    assert original_stays or (len(shown.nodes), len(shown.roots)) == (3, 1)


def test_work_done_afresh_leaves_the_earlier_result_to_its_readers(tmp_path: Path, config: RunConfig) -> None:
    """Up to the moment when the new one stands in its place; for good where the work fails."""
    recorder, store = Recorder(), Store(tmp_path)
    first, _ = run(recorder.step(), config, store)
    recorder.fail = DataError("bad row")
    with store.reading([("fake", first.key)]), pytest.raises(DataError):
        run(recorder.step(), config, store, reuse=False)
    assert Path(first.outputs["result"].uri).read_text() == "10"
    recorder.fail = None
    (Path(first.outputs["result"].uri).parent / "more").write_text("of the first")
    again, _ = run(recorder.step(), config, store, reuse=False)
    assert recorder.runs == 3 and not (Path(again.outputs["result"].uri).parent / "more").exists()
    assert not list((tmp_path / "tmp").iterdir())


def test_a_failed_body_publishes_nothing_but_keeps_its_work(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    recorder.fail = DataError("bad row")
    with pytest.raises(DataError):
        run(recorder.step(), config, store)
    key, _ = content_key(recorder.step(), config, {"data": ArtifactRef("somewhere", "rows", "d1")})
    assert store.find("fake", key) is None
    assert (store.work_folder("fake", key) / "progress").read_text() == "kept"
    recorder.fail = None
    run(recorder.step(), config, store)
    assert not store.work_folder("fake", key).exists()


def test_a_full_disk_is_a_store_error_with_the_way_out(tmp_path: Path, config: RunConfig) -> None:
    recorder = Recorder()
    recorder.fail = OSError(28, "No space left on device", "somewhere/file")
    with pytest.raises(StoreError, match="free space") as caught:
        run(recorder.step(), config, Store(tmp_path))
    assert caught.value.where == "somewhere/file"


def test_the_manifest_survives_json(tmp_path: Path, config: RunConfig) -> None:
    manifest, _ = run(Recorder().step(), config, Store(tmp_path))
    assert StepManifest.from_dict(manifest.to_dict()) == manifest


def test_interrupted_work_goes_on_under_settings_that_do_not_decide_it(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    step = dataclasses.replace(recorder.step(), work_settings=lambda config: {"steps": config.train.steps})
    recorder.fail = DataError("stopped")
    with pytest.raises(DataError):
        run(step, config, store)
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    assert content_key(step, config, {})[0] != content_key(step, other, {})[0]
    (left,) = (tmp_path / "work" / "fake").iterdir()
    recorder.fail = None
    seen: list[bool] = []
    body = step.body
    step = dataclasses.replace(step, body=lambda c: (seen.append((c.work / "progress").exists()), body(c))[1])
    run(step, other, store)
    assert seen == [True] and not left.exists()


def test_unfinished_work_of_other_settings_is_told(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    step = dataclasses.replace(recorder.step(), work_settings=lambda config: {"train": {"seed": config.train.seed}})
    recorder.fail = DataError("stopped")
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    for wanted in (config, config, other):
        said: list[str] = []
        with pytest.raises(DataError):
            run_step(step, wanted, {}, store=store, say=said.append)
        told = [line for line in said if "unfinished" in line]
        if wanted is config:
            assert not told
    assert len(told) == 1 and f"train.seed {config.train.seed} -> 7" in told[0]
    assert str(tmp_path / "work" / "fake") in told[0]


def test_work_that_cannot_be_begun_is_a_store_error(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "work").write_text("no folder")
    step = dataclasses.replace(Recorder().step(), work_settings=lambda config: {})
    with pytest.raises(StoreError, match="noting what is begun failed"):
        run(step, config, Store(tmp_path))


def test_training_goes_on_with_another_way_of_saving_and_looking(config: RunConfig) -> None:
    def changed(**values: object) -> RunConfig:
        return config.model_copy(update={"train": config.train.model_copy(update=values)})

    for values in ({"evaluate_every_steps": 3}, {"micro_batch_rows": 2}, {"incidents": Incidents(non_finite="skip")}):
        assert train.settings(changed(**values)) != train.settings(config), values
        assert train.work_settings(changed(**values)) == train.work_settings(config)
    assert train.work_settings(changed(seed=99)) != train.work_settings(config)


def test_training_goes_on_with_another_number_of_workers(config: RunConfig) -> None:
    two = config.model_copy(update={"compute": config.compute.model_copy(update={"devices_per_node": 2})})
    assert train.settings(config) != train.settings(two)
    assert train.work_settings(config) == train.work_settings(two)


def test_a_manifest_says_which_run_made_it_on_what(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    made_by = MadeBy("SFTFlow", "17", "train", "ann", origin="12")
    with results_of(made_by):
        first, _ = run(recorder.step(), config, store)
    second, _ = run(recorder.step(), config, store)
    later, _ = run(recorder.step(version=2), config, store)
    assert first.made_by == second.made_by == made_by and later.made_by is None
    assert first.hardware["cores"] == str(os.cpu_count())
    assert sources_of(store, first.key_parts["source"]) == source_digests("posttrain_lib.errors")
    assert packages_of(store, first.environment)


def test_code_is_what_it_was_when_the_step_began(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are edited while a step runs."""
    code = {"commit": "before"}
    monkeypatch.setattr(base, "keep_code", lambda store: dict(code))
    step = Recorder().step()
    body = step.body

    def edits(context: StepContext) -> StepResult:
        code["commit"] = "after"
        return body(context)

    manifest, _ = run(dataclasses.replace(step, body=edits), config, Store(tmp_path))
    assert manifest.code == {"commit": "before"}


def test_an_input_that_was_cleaned_away_is_named(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    first, _ = run(recorder.step(), config, store)
    second = dataclasses.replace(recorder.step(), name="next", inputs=lambda *_: dict(first.outputs))
    folder = store.result_folder("fake", first.key)
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match="the input result, a result of fake, is gone") as caught:
        run(second, config, store)
    assert caught.value.where == str(folder) and "resume it from step fake" in str(caught.value.fix)


def test_inputs_are_not_removed_while_a_step_reads_them(tmp_path: Path, config: RunConfig) -> None:
    recorder, store = Recorder(), Store(tmp_path)
    first, _ = run(recorder.step(), config, store)
    removed: list[bool] = []

    def body(context: StepContext) -> StepResult:
        removed.extend(store.remove(entry) for entry in store.entries())
        return StepResult({})

    run(
        dataclasses.replace(recorder.step(), name="next", inputs=lambda *_: dict(first.outputs), body=body),
        config,
        store,
    )
    assert removed == [False, False], "the input, and what the step was writing"
