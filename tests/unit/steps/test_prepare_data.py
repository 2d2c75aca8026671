"""Which fields of the data section decide what is prepared: all of them, but for those that are named here."""

from __future__ import annotations

import datetime
from typing import Any, get_args

import pytest

from posttrain_lib.config import RunConfig
from posttrain_lib.config.base import Section
from posttrain_lib.config.data import DataConfig
from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.digests import digest_value
from steps import inputs, prepare_data

DATA: dict[str, Any] = {
    "sources": [{"name": "a", "generate": {"of": "lookups"}}],
    "template_kwargs": {"tools": {"one": 1, "two": 2}},
    "max_example_tokens": 64,
}
#: field -> another value
OTHER: dict[str, Any] = {
    "sources.name": "b",
    "sources.format": "prompts",
    "sources.fields": {"messages": "turns"},
    "sources.generate.rows": 11,
    "sources.generate.seed": 1,
    "sources.generate.of": "events",
    "tokenizer": "owner/name",
    "chat_template": "template.jinja",
    "template_date": "2027-01-01",
    "template_kwargs": {"tools": {"two": 2, "one": 1}},
    "trained_turns": "last",
    "max_example_tokens": 63,
    "over_length": "split",
    "train_on": "last",
    "control_tokens": "as_text",
    "deduplicate": True,
    "engine": "hf",
    "on_the_fly": True,
    "on_the_fly_sample": 100,
    "max_refused_fraction": 0.5,
    "held_out.fraction": 0.1,
    "held_out.group_field": None,
    "held_out.seed": 1,
}
#: field -> (another value, why it cannot change what is prepared)
DECIDES_NOTHING: dict[str, tuple[Any, str]] = {
    "workers": (3, "results are put in order"),
    "serving_check": ("off", "what is prepared is compared afterwards"),
    "serving_accepts": (["unchecked"], "what is prepared is compared afterwards"),
    "serving_samples": (1, "what is prepared is compared afterwards"),
}
#: by the content of what it names, or only together with others
ELSEWHERE = {"sources.path", "sources.generate.pairs"}


def fields_of(section: type[Section], before: str = "") -> set[str]:
    """Every field that holds no section, with the fields that lead to it."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        found |= fields_of(inner[0], f"{before}{name}.") if inner else {before + name}
    return found


def config_of(data: dict[str, Any]) -> RunConfig:
    train = {"steps": 10, "row_tokens": 64, "shuffle_window": 100}
    model = {"path": "folder"}
    return build_run_config({"name": "test", "data": data, "model": model, "train": train})


def key_of(data: dict[str, Any]) -> str:
    config = config_of(data)
    return digest_value([inputs.settings(config), prepare_data.settings(config)])


def changed(field: str, value: Any) -> dict[str, Any]:
    *path, last = field.split(".")
    data = {**DATA, "sources": [{**DATA["sources"][0], "generate": {**DATA["sources"][0]["generate"]}}]}
    section: Any = data
    for name in path:
        section = section.setdefault(name, {})
        section = section[0] if isinstance(section, list) else section
    section[last] = value
    return data


def test_every_field_is_looked_at() -> None:
    assert fields_of(DataConfig) == {*OTHER, *DECIDES_NOTHING, *ELSEWHERE}


@pytest.mark.parametrize("field", OTHER)
def test_what_decides_is_in_the_key(field: str) -> None:
    assert key_of(changed(field, OTHER[field])) != key_of(DATA)


@pytest.mark.parametrize("field", DECIDES_NOTHING)
def test_what_decides_nothing_is_not(field: str) -> None:
    assert key_of(changed(field, DECIDES_NOTHING[field][0])) == key_of(DATA)


def test_pairs_are_in_the_key() -> None:
    alone, pairs = (
        inputs.settings(config_of({**DATA, "sources": [{"name": "a", "generate": made, "format": kind}]}))
        for made, kind in (({}, "messages"), ({"pairs": True}, "preference"))
    )
    assert alone != pairs


def test_rows_count_by_their_content() -> None:
    one, other = (config_of({**DATA, "sources": [{"name": "a", "path": path}]}) for path in ("one", "other"))
    assert prepare_data.settings(one) == prepare_data.settings(other)


@pytest.mark.parametrize(
    "same",
    [
        {"held_out": {"fraction": 0.05}},
        {"template_date": datetime.date(2026, 1, 1)},
        {"workers": 0},
        {"chat_template": None},
    ],
)
def test_a_default_that_is_spelt_out_is_no_other_value(same: dict[str, Any]) -> None:
    assert key_of({**DATA, **same}) == key_of(DATA)


def test_a_variable_of_the_template_is_what_a_flow_hands_on() -> None:
    """A flow hands the config on as JSON: what a step alone reads from the same file must be the same to a template."""
    read = {"today": datetime.date(2026, 1, 1), "names": {1: "one"}}
    config = config_of({**DATA, "template_kwargs": read})
    assert config.data.template_kwargs == {"today": "2026-01-01", "names": {"1": "one"}}
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match="template_kwargs"):
        config_of({**DATA, "template_kwargs": {"limit": float("nan")}})
