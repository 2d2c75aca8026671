"""A run file fails at once, at the right place, with the nearest right key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from posttrain_lib.config import RunConfig, load_run_config
from posttrain_lib.config.load import build_run_config, dump_yaml, load_yaml, parse_run_config
from posttrain_lib.errors import ConfigError

DEFAULT = Path(__file__).resolve().parents[3] / "configs" / "sft" / "default.yaml"
MINIMAL: dict[str, Any] = {
    "name": "test",
    "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 64},
    "model": {"path": "folder"},
    "train": {"steps": 10, "row_tokens": 64},
}


def refused(change: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_run_config(MINIMAL, overrides=change)
    return str(caught.value)


def test_minimal_config_is_complete_and_frozen() -> None:
    config = build_run_config(MINIMAL)
    assert config.train.optimizer.name == "adamw"
    with pytest.raises(ValidationError):
        config.train.steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "place", "nearest"),
    [
        ("trian.steps=1", "trian", "train"),
        ("train.stepps=1", "train.stepps", "steps"),
        ("train.optimizer.learning=1", "train.optimizer.learning", None),
        ("train.optimizer.weight_decy=0.1", "train.optimizer.weight_decy", "weight_decay"),
        ("data.sources=[{name: a, pth: x, path: y}]", "data.sources.0.pth", "path"),
        ("model.verification.teir=light", "model.verification.teir", "tier"),
        ("train.mixture.sources.a.wieght=1", "train.mixture.sources.a.wieght", "weight"),
        ("train.mixture.sources.weight.wieght=1", "train.mixture.sources.weight.wieght", "weight"),
    ],
)
def test_unknown_keys_name_their_place_and_the_nearest(key: str, place: str, nearest: str | None) -> None:
    message = refused([key])
    assert f"unknown key '{place}'" in message
    assert (f"did you mean '{nearest}'" in message) is (nearest is not None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["data.max_example_tokens=128"], "exceeds train.row_tokens"),
        (["train.rows_per_step=3", "compute.devices_per_node=2"], "not a multiple"),
        (["train.epochs=1"], "exactly one of 'steps' and 'epochs'"),
        (["train.schedule.warmup_steps=11"], "exceeds steps"),
        (["compute.launcher=in_process", "compute.devices_per_node=2"], "one worker"),
        (["data.sources=[{name: a, path: x}, {name: a, path: y}]"], "must differ"),
        (["data.sources=[{name: a}]"], "exactly one of 'path' and 'generate'"),
        (["model.from_scratch.architecture={}"], "exactly one of 'path' and 'from_scratch'"),
        (["train.optimizer.lr=-1"], "train.optimizer.lr"),
        (["train.clip_norm=.nan"], "train.clip_norm"),
        (["train.optimizer.lr=fast"], "train.optimizer.lr"),
        (["recipe=ppo"], "recipe"),
        (["data.sources=[{name: all, path: x}]"], "mean over all sources"),
    ],
)
def test_impossible_values_and_combinations(change: list[str], said: str) -> None:
    assert said in refused(change)


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=true",
        "train.optimizer.lr=yes",
        "train.seed=off",
        "train.optimizer.betas=[false, 0.9]",
        "model.lora={rank: on}",
        "train.clip_norm=true",
        "train.mixture.sources.a.weight=true",
        "data.workers=no",
    ],
)
def test_a_truth_value_is_no_number(change: str) -> None:
    assert "true and false are no values" in refused([change])


@pytest.mark.parametrize("text", ["1e-5", "1E5", "-2e+3", "1.e2", ".5e1", "3.25e-07"])
def test_a_number_with_an_exponent_alone_is_a_number_in_free_options_too(text: str) -> None:
    config = build_run_config(MINIMAL, overrides=[f"train.loss_options={{gamma: {text}, name: 'e5', id: 'a1e5'}}"])
    assert config.train.loss_options == {"gamma": float(text), "name": "e5", "id": "a1e5"}


def test_what_is_written_out_is_read_to_the_same() -> None:
    plain = {"a": "1e-5", "b": 1e-5, "c": "1e5", "d": 1e22, "e": "010", "f": "yes", "g": "2026-01-01", "h": None}
    assert load_yaml(dump_yaml(plain), "x.yaml") == plain


def test_a_number_may_be_a_text_or_whole() -> None:
    """As that of every environment variable is."""
    config = build_run_config(MINIMAL, overrides=["train.optimizer.lr=1e-5", "train.steps='7'", "train.clip_norm=1"])
    assert (config.train.optimizer.lr, config.train.steps, config.train.clip_norm) == (1e-5, 7, 1.0)


def test_overrides_do_not_touch_the_original() -> None:
    before = yaml.safe_dump(MINIMAL)
    assert build_run_config(MINIMAL, overrides=["train.optimizer.lr=0.5"]).train.optimizer.lr == 0.5
    assert yaml.safe_dump(MINIMAL) == before


def test_override_through_a_value_is_refused() -> None:
    assert "no section" in refused(["name.first=1"])
    assert "section.key=value" in refused(["train.steps"])


def test_variables_expand_or_name_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_FOLDER", "there")
    assert build_run_config(MINIMAL, overrides=["model.path=${SOME_FOLDER}/x"]).model.path == "there/x"
    monkeypatch.delenv("SOME_FOLDER")
    message = refused(["model.path=${SOME_FOLDER}/x"])
    assert "SOME_FOLDER" in message
    assert "model.path" in message


def test_broken_yaml_names_the_line() -> None:
    with pytest.raises(ConfigError, match="line 3"):
        parse_run_config("name: a\ndata:\n  sources: [}\ntrain: {}\n", where="file.yaml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_run_config(tmp_path / "absent.yaml")


def test_resolved_form_loads_to_the_same_config() -> None:
    config = build_run_config(MINIMAL)
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_key_that_stands_twice_is_refused() -> None:
    text = "name: a\ntrain: {steps: 1}\ntrain: {steps: 2}\n"
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        parse_run_config(text, where="file.yaml")
    assert "'train' stands twice" in str(caught.value) and "line 3" in str(caught.value)


def test_a_key_that_stands_twice_in_an_override_is_refused() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        build_run_config(MINIMAL, overrides=["train.optimizer={lr: 1.0e-4, lr: 1.0e-5}"])


def test_a_key_that_is_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_run_config("? [a, b]\n: 1\n")


def test_an_override_of_broken_yaml_is_named() -> None:
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_run_config(DEFAULT, ["train.optimizer.lr=@x"])
    assert "train.optimizer.lr" in str(caught.value)


def test_overrides_come_together_or_one_by_one() -> None:
    apart = load_run_config(DEFAULT, ["train.steps=50", "train.seed=1"])
    assert load_run_config(DEFAULT, ["train.steps=50,train.seed=1"]) == apart
    assert (apart.train.steps, apart.train.seed) == (50, 1)


def test_what_looks_like_an_override_within_a_value_is_none() -> None:
    overrides = 'model.path="a,b=c",data.sources=[{name: a, path: "day,part=1"}],train.seed=1'
    config = build_run_config(MINIMAL, overrides=[overrides])
    assert (config.model.path, config.data.sources[0].path, config.train.seed) == ("a,b=c", "day,part=1", 1)


def test_overrides_through_names_with_other_signs_come_apart() -> None:
    sources = [{"name": "a-b", "path": "rows.jsonl"}]
    raw = {**MINIMAL, "data": {**MINIMAL["data"], "sources": sources}}
    config = build_run_config(raw, overrides=["data.chat_template=x.jinja,train.mixture.sources.a-b.weight=2"])
    assert config.data.chat_template == "x.jinja"
    assert config.train.mixture is not None and config.train.mixture.sources["a-b"].weight == 2


def test_a_mapping_that_stands_further_in_may_be_merged_where_it_changes_a_key() -> None:
    text = "in: {it: {deep: &deep {<<: &base {weight: 1}, weight: 2}}}\nout: {<<: *deep, epochs: 3}\n"
    assert load_yaml(text, "x.yaml")["out"] == {"weight": 2, "epochs": 3}


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_run_config(tmp_path / "latin.yaml")
    assert "latin.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "train.optimizer.betas=[2,3]",
        "evaluation.exact_match_prompts=0",
        "data.template_date=2026-02-30",
        "data.sources=[{name: ../../evil, generate: {rows: 20}}]",
    ],
)
def test_what_cannot_work_is_refused_before_any_work(override: str) -> None:
    with pytest.raises(ConfigError):
        load_run_config(DEFAULT, [override])


def test_a_date_that_yaml_reads_as_one_is_a_date() -> None:
    assert load_run_config(DEFAULT, ["data.template_date=2026-02-01"]).data.template_date == "2026-02-01"


@pytest.mark.parametrize(
    ("overrides", "named", "not_named"),
    [
        (["train.row_tokens=32", "name=x"], "config, with train.row_tokens=32 and name=x", "whole file"),
        (["train.steps=0", "name=x"], "config, with train.steps=0", "name=x"),
        (["train={steps: 0, row_tokens: 64}"], "config, with train={steps: 0, row_tokens: 64}", "whole file"),
        (["train.epochs=1", "name=x"], "config, with train.epochs=1", "name=x"),
    ],
    ids=["sections disagree", "a field", "its section", "fields disagree"],
)
def test_the_override_that_is_at_fault_is_named(overrides: list[str], named: str, not_named: str) -> None:
    message = refused(overrides)
    assert named in message and not_named not in message


def test_no_override_is_named_where_none_is_at_fault() -> None:
    with pytest.raises(ConfigError, match="field 'train") as caught:
        build_run_config({**MINIMAL, "train": {"steps": 0, "row_tokens": 64}}, overrides=["name=x"])
    assert caught.value.where == "config"
