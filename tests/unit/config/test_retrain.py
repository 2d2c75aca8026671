"""The file of a retrain fails at once, at the right place, with the nearest right key; so does its run file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain_lib.config.retrain import PROJECT_ROOT, build_retrain_config, parse_retrain_config
from posttrain_lib.errors import ConfigError
from tests.support.retrain_suite import suite_text

DEFAULT = PROJECT_ROOT / "configs" / "retrain" / "default.yaml"
MINIMAL: dict[str, Any] = {
    "name": "mine", "run_file": "configs/sft/retrain.yaml", "landing": {"path": "/data/landing"}
}  # fmt: skip


def parsed(**changes: Any) -> Any:
    return parse_retrain_config(yaml.safe_dump({**MINIMAL, **changes}))


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(**changes)
    return str(caught.value)


def test_the_default_is_whole() -> None:
    config = parse_retrain_config(DEFAULT.read_text())
    assert config.run.name == "retrain-default" and config.run.export.verify_vllm
    assert build_retrain_config(config.model_dump(mode="json")) == config


def test_the_default_s_suite_is_what_its_maker_makes() -> None:
    assert (PROJECT_ROOT / "posttrain_lib" / "embedded" / "suite.jsonl").read_text() == suite_text()


def test_values_of_the_run_file_are_laid_over_it() -> None:
    config = parsed(run={"train": {"steps": 70}, "evaluation": {"samples": 1}})
    assert (config.run.train.steps, config.run.train.row_tokens, config.run.evaluation.samples) == (70, 512, 1)


def test_overrides_reach_into_the_run_file() -> None:
    raw = parsed().model_dump(mode="json")
    config = build_retrain_config(raw, overrides=["run.train.steps=90,landing.rejected=offer_again"])
    assert (config.run.train.steps, config.landing.rejected) == (90, "offer_again")
    bounds = {"min": None, "max": None, "min_change": None, "max_change": -5.0}
    config = build_retrain_config(raw, overrides=["gates.held_out.loss.max_change=-5"])
    assert config.gates["held_out.loss"].model_dump() == bounds
    with pytest.raises(ConfigError, match="read when the flow's own config is"):
        build_retrain_config(raw, overrides=["run_file=configs/sft/default.yaml"])


@pytest.mark.parametrize(
    ("changes", "place", "nearest"),
    [
        ({"landnig": {}}, "landnig", "landing"),
        ({"landing": {"path": "x", "rejectd": "leave_out"}}, "landing.rejectd", "rejected"),
        ({"gates": {"held_out.loss": {"max_chagne": 0}}}, "gates.held_out.loss.max_chagne", "max_change"),
        ({"run": {"train": {"stpes": 1}}}, "run.train.stpes", "steps"),
        ({"schedule": {"corn": "0 3 * * ? *"}}, "schedule.corn", "cron"),
    ],
)
def test_a_misspelt_key_names_the_nearest(changes: dict[str, Any], place: str, nearest: str) -> None:
    message = refused(**changes)
    assert f"unknown key '{place}'" in message and f"did you mean '{nearest}'?" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_file": "nowhere.yaml"}, "run file of a retrain cannot be read"),
        ({"landing": {}}, "exactly one of 'path' and 'generate'"),
        ({"landing": {"generate": {}, "format": "preference"}}, "generated rows are of format messages"),
        ({"landing": {"path": "x", "name": "generated"}}, "is a source of the run file too"),
        ({"gates": {"suit.accuracy": {"min": 0.5}}}, "gates names 'suit.accuracy'"),
        ({"gates": {}}, "at least 1 item"),
        ({"schedule": {"cron": "0 3 * *"}}, "4 fields where 6 are wanted"),
        ({"schedule": {"timezone": "Europe/Berln"}}, "did you mean 'Europe/Berlin'"),
        ({"gates": {"held_out.loss": {}}}, "a gate demands something"),
        ({"name": "a/b"}, "config field 'name'"),
        ({"run": 5}, "config field 'run'"),
        ({"landing": {"path": "x", "name": "all"}}, "mean over all sources"),
        ({"run_file": "${NOT_SET_ANYWHERE}/x.yaml"}, "NOT_SET_ANYWHERE is not set"),
        ({"run": {"train": {"row_tokens": 64}}}, "train.row_tokens"),
        ({"suites": [{"task": "perplexity"}, {"task": "perplexity"}]}, "several tasks are called 'perplexity'"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], said: str) -> None:
    assert said in refused(**changes)


def test_a_file_without_a_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="config field 'run'"):
        parse_retrain_config(yaml.safe_dump({"name": "mine", "landing": {"path": "x"}}))


def test_a_run_file_anywhere(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text((PROJECT_ROOT / "configs" / "sft" / "retrain.yaml").read_text())
    assert parsed(run_file=str(copy)).run == parsed().run


def test_a_run_file_in_a_folder_that_a_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_FILES", "configs/sft")
    config = parsed(run_file="${RUN_FILES}/retrain.yaml")
    assert config == parsed()
    assert build_retrain_config(config.model_dump(mode="json")) == config
