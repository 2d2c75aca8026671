"""A run file of the conversion flow fails like any other: at once, at the right place, with the nearest right key."""

from typing import Any

import pytest

from posttrain_lib.config.convert import build_convert_config, parse_convert_config
from posttrain_lib.errors import ConfigError

MINIMAL: dict[str, Any] = {"model": {"path": "folder"}}
LLM = "conversion.agent={kind: llm, command: [agent]}"


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build_convert_config(MINIMAL, overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "place", "nearest"),
    [
        ("convresion.max_attempts=1", "convresion", "conversion"),
        ("conversion.max_atempts=1", "conversion.max_atempts", "max_attempts"),
        ("conversion.limits.gate_second=1", "conversion.limits.gate_second", "gate_seconds"),
        ("model.verification.teir=light", "model.verification.teir", "tier"),
        ("conversion.agent={kind: llm, comand: [agent]}", "conversion.agent.llm.comand", "command"),
        ("conversion.agent={kind: search, command: [agent]}", "conversion.agent.search.command", None),
    ],
)
def test_unknown_keys_name_their_place_and_the_nearest(key: str, place: str, nearest: str | None) -> None:
    message = refused(key)
    assert f"unknown key '{place}'" in message
    assert (f"did you mean '{nearest}'" in message) is (nearest is not None)


def test_keys_of_a_training_run_are_not_offered() -> None:
    message = refused("train.steps=5")
    assert "unknown key 'train'" in message
    assert "one of: conversion, model, name, recipe" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["conversion.agent={kind: llm}"], "exactly one of 'base_url' and 'command'"),
        (["conversion.agent={kind: llm, base_url: x}"], "an endpoint needs 'model'"),
        (["conversion.agent={kind: oracle}"], "conversion.agent"),
        ([LLM, "conversion.max_attempts=0"], "conversion.max_attempts"),
        (["recipe=sft"], "recipe"),
    ],
)
def test_impossible_values_and_combinations(change: list[str], said: str) -> None:
    assert said in refused(*change)


def test_overrides_and_variables_are_those_of_every_run_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "there")
    config = build_convert_config(MINIMAL, overrides=["model.path=${SOME_FOLDER}/x,conversion.max_attempts=3"])
    assert (config.model.path, config.conversion.max_attempts) == ("there/x", 3)


def test_broken_yaml_names_the_line() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        parse_convert_config("model: {path: x}\nmodel: {path: y}\n", where="file.yaml")
