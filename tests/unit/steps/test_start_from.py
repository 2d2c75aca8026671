"""Models by the name of what made them: how names are read, and what is refused. Results are hand-made, by the real
step runner; tests/flows/test_start_from.py has the same with Metaflow's own runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.adapters.metaflow_runs import FlowRun, flow_file
from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import build_run_config
from posttrain_lib.config.origin import ModelOrigin
from posttrain_lib.errors import ConfigError, ModelError
from posttrain_lib.lineage.store import Store
from steps import convert_pipeline, evaluate, inputs
from steps.base import content_key
from steps.convert_model import STEP as CONVERT
from steps.promote import promote
from steps.start_from import FLOWS, RunNames, exported_by, is_name, resolve_model, told, with_models_found
from tests.support.exported import RAW, folder_of, publish_run


def named(path: str) -> RunConfig:
    return build_run_config({**RAW, "model": {"path": path}})


def a_run(manifests: dict[str, Any], state: str = "successful") -> FlowRun:
    return FlowRun("SFTFlow", "17", state, ("kind:chat",), manifests, build_run_config(RAW).model_dump(mode="json"))


@pytest.fixture
def promoted(isolated_store: Path) -> Path:
    """``models/mine`` in a store of its own; the folder."""
    folder = folder_of(publish_run())
    promote(Store(), "mine", str(folder))
    return folder


@pytest.mark.parametrize("path", ["SFTFlow/latest", "RewardFlow/tag:exp:1/2", "DPOFlow/1795696944952819", "models/a@2"])
def test_names(path: str) -> None:
    assert is_name(path, where="model.path")


@pytest.mark.parametrize(
    "path", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3@main", "s3://b/models/x", "PrefectFlow/x", "/models/a", "a/SFTFlow/3"]
)
def test_folders_urls_and_hub_ids_are_none(path: str) -> None:
    assert not is_name(path, where="model.path")


@pytest.mark.parametrize(("path", "meant"), [("SFTFLow/3", "SFTFlow"), ("RewardsFlow/latest", "RewardFlow")])
def test_a_misspelt_flow_is_no_hub_id(path: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        is_name(path, where="model.path")


def test_a_flow_without_a_model() -> None:
    with pytest.raises(ConfigError, match="no flow of that name exports a model"):
        is_name("ConvertFlow/latest", where="model.path")


def test_a_folder_of_a_names_spelling_is_taken_where_only_it_can_be_meant(
    promoted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/other", "models/mine", "SFTFlow/latest"):
        Path(name).mkdir(parents=True)
    assert not is_name("models/other", where="model.path")
    for doubtful in ("models/mine", "SFTFlow/latest"):
        with pytest.raises(ConfigError, match=f"write ./{doubtful} for the folder"):
            is_name(doubtful, where="model.path")


def test_what_a_run_exported(isolated_store: Path) -> None:
    manifests = publish_run()
    found = exported_by(a_run(manifests), where="model.path")
    assert found.path == folder_of(manifests)
    assert found.digest == manifests["export"]["outputs"]["hf"]["digest"]
    key = manifests["export"]["key"]
    assert found.lineage == {"flow": "SFTFlow", "run": "17", "step": "export", "key": key, "tags": ["kind:chat"]}


@pytest.mark.parametrize("state", ["failed in step end", "not finished: it runs, or was stopped"])
def test_a_run_that_did_not_go_through(isolated_store: Path, state: str) -> None:
    with pytest.raises(ConfigError, match=r"resume --origin-run-id 17; SFTFlow/latest") as caught:
        exported_by(a_run(publish_run(), state), where="model.path")
    assert state in str(caught.value)


def test_a_run_without_export(isolated_store: Path) -> None:
    manifests = publish_run()
    del manifests["export"]
    with pytest.raises(ConfigError, match="exported no model") as caught:
        exported_by(a_run(manifests), where="model.path")
    assert "train, evaluate" in str(caught.value)


def test_a_pruned_export_says_how_to_make_it_again(isolated_store: Path) -> None:
    manifests = publish_run()
    shutil.rmtree(folder_of(manifests).parent)
    with pytest.raises(ModelError, match=r"sft_flow\.py resume start --origin-run-id 17"):
        exported_by(a_run(manifests), where="model.path")


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_export_names_the_file(isolated_store: Path, damage: str) -> None:
    manifests = publish_run()
    weights = folder_of(manifests) / "model.safetensors"
    weights.write_text("w") if damage == "cut" else weights.unlink()
    with pytest.raises(ModelError, match=r"hf/model\.safetensors"):
        exported_by(a_run(manifests), where="model.path")


def test_a_promoted_model_by_name_and_by_version(promoted: Path) -> None:
    other = folder_of(publish_run(words="other weights"))
    promote(Store(), "mine", str(other))
    assert resolve_model("models/mine").path == other
    assert resolve_model("models/mine@1").path == promoted
    assert resolve_model("models/mine@1").lineage["promoted"] == "mine@1"


def test_promoted_models_that_are_not_there_name_those_that_are(promoted: Path) -> None:
    with pytest.raises(ConfigError, match="one of: mine"):
        resolve_model("models/yours")
    with pytest.raises(ConfigError, match="expected: 1"):
        resolve_model("models/mine@2")


def test_a_promoted_folder_that_changed_or_went(promoted: Path) -> None:
    (promoted / "more").write_text("x")
    with pytest.raises(ModelError, match="is not what it was") as caught:
        resolve_model("models/mine")
    assert "--name mine --rollback VERSION --note WHY" in str(caught.value)
    shutil.rmtree(promoted)
    with pytest.raises(ModelError, match="folder is gone"):
        resolve_model("models/mine")


def test_a_reward_model_is_taken_only_where_one_may_be(isolated_store: Path) -> None:
    folder = folder_of(publish_run(architecture="Qwen3ForSequenceClassification"))
    promote(Store(), "judge", str(folder))
    with pytest.raises(ModelError, match="no causal language model"):
        resolve_model("models/judge")
    assert resolve_model("models/judge", needs="any").path == folder


def test_a_judge_is_named_in_a_task(isolated_store: Path) -> None:
    judge = folder_of(publish_run(architecture="Qwen3ForSequenceClassification"))
    promote(Store(), "judge", str(judge))
    promote(Store(), "writer", str(folder_of(publish_run())))

    def judged_by(path: str) -> RunConfig:
        task = {"task": "win_rate", "reward_model": {"path": path}, "prompts": 2}
        return build_run_config({**RAW, "evaluation": {"tasks": [{"task": "perplexity"}, task]}})

    config = with_models_found(judged_by("models/judge"), say=lambda _: None)
    found = config.evaluation.tasks[1]
    assert found.arguments()["reward_model"] == str(judge)
    assert found.reward_model.origin.promoted == "judge@1"
    named_otherwise = with_models_found(judged_by("models/judge@1"), say=lambda _: None)
    assert evaluate.settings(config) == evaluate.settings(named_otherwise) == evaluate.settings(judged_by(str(judge)))
    with pytest.raises(ModelError, match="no reward model") as caught:
        with_models_found(judged_by("models/writer"))
    assert "evaluation.tasks[1].reward_model.path" in str(caught.value)


def test_the_config_gets_the_folder_and_where_it_came_from(promoted: Path) -> None:
    said: list[str] = []
    config = with_models_found(named("models/mine"), say=said.append)
    assert config.model.path == str(promoted)
    origin = config.model.origin
    assert origin is not None and origin.reference == "models/mine" and origin.promoted == "mine@1"
    assert said == [f"model.path: models/mine = models/mine@1 -> {promoted}, digest {origin.digest[:12]}"]
    assert with_models_found(config) is config, "what was found is not looked up again"


def test_the_conversion_flow_takes_names_too(promoted: Path) -> None:
    resolved = convert_pipeline.resolve({"model": {"path": "folder"}}, "models/mine", "")
    assert resolved["model"]["path"] == str(promoted)
    assert resolved["model"]["origin"]["promoted"] == "mine@1"


def test_other_models_are_left_as_they_are() -> None:
    config = named("Qwen/Qwen3-0.6B")
    assert with_models_found(config) is config


def test_an_origin_of_another_path_is_refused(promoted: Path) -> None:
    raw = with_models_found(named("models/mine"), say=lambda _: None).model_dump(mode="json")
    with pytest.raises(ConfigError, match="origin tells of another model"):
        build_run_config(raw, overrides=["model.path=elsewhere"])


def test_a_resumed_run_keeps_what_was_found(promoted: Path) -> None:
    config, say = named("models/mine"), lambda _: None
    first = with_models_found(config, run=RunNames("SFTFlow/1"), say=say)
    promote(Store(), "mine", str(folder_of(publish_run(words="newer"))))
    resumed = with_models_found(config, run=RunNames("SFTFlow/2", ("SFTFlow/1",)), say=say)
    again = with_models_found(config, run=RunNames("SFTFlow/3", ("SFTFlow/2", "SFTFlow/1")), say=say)
    assert first.model.path == resumed.model.path == again.model.path == str(promoted)
    fresh = with_models_found(config, run=RunNames("SFTFlow/4"), say=say)
    assert fresh.model.origin is not None and fresh.model.origin.promoted == "mine@2"


def test_what_was_found_and_went_is_missed(promoted: Path) -> None:
    config, say = named("models/mine"), lambda _: None
    first = with_models_found(config, run=RunNames("SFTFlow/1"), say=say)
    shutil.rmtree(promoted.parent)
    for wanted, run in ((config, RunNames("SFTFlow/2", ("SFTFlow/1",))), (first, None)):
        with pytest.raises(ModelError, match="no longer in the store"):
            with_models_found(wanted, run=run, say=say)


def test_later_steps_go_by_the_content_not_by_the_name(tmp_path: Path, family_folder: Any) -> None:
    """The same folder by its path and by a name: another inputs result, the same key behind it."""
    folder = family_folder("llama")
    by_path = named(str(folder))
    digest = inputs.known_digests().path(folder)
    origin = ModelOrigin(reference="SFTFlow/latest", path=str(folder), digest=digest, flow="SFTFlow", run="17")
    by_name = by_path.model_copy(update={"model": by_path.model.model_copy(update={"origin": origin})})
    found = {"model": inputs.ArtifactRef(str(folder), "model", digest)}
    assert content_key(inputs.STEP, by_path, found)[0] != content_key(inputs.STEP, by_name, found)[0]
    assert content_key(CONVERT, by_path, found)[0] == content_key(CONVERT, by_name, found)[0]
    assert inputs.settings(by_name)["model"]["origin"]["run"] == "17"
    inputs._check_unchanged(origin, found["model"])
    changed = dataclasses.replace(found["model"], digest="0" * 64)
    with pytest.raises(ModelError, match="changed after it was published") as caught:
        inputs._check_unchanged(origin, changed)
    assert "SFTFlow/17" in str(caught.value)
    assert told(origin).startswith("SFTFlow/latest = SFTFlow/17 -> ")


def test_every_flow_here_stands_in_the_file_that_an_error_names() -> None:
    root = Path(__file__).resolve().parents[3] / "flows"
    classes = {path.name: path.read_text() for path in root.glob("*_flow.py")}
    for flow in (*FLOWS, "ConvertFlow"):
        text = classes.get(flow_file(flow))
        assert text is None or f"class {flow}(" in text
    assert flow_file("SFTFlow") in classes
