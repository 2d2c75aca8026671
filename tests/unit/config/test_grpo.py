"""The grpo section: what it makes of the run, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config import RunConfig, load_run_config
from posttrain_lib.config.grpo import FrozenPolicy
from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.losses import loss_of
from steps import evaluate, train
from steps.pipeline import resolve

DEFAULT = PROJECT_ROOT / "configs" / "grpo" / "default.yaml"


def resolved(*overrides: str) -> Any:
    return load_run_config(DEFAULT, overrides)


def test_the_section_says_the_loss() -> None:
    config = resolved("grpo.clip_high=0.28", "grpo.aggregate=constant", "grpo.rollout.temperature=0.7")
    assert config.trained.loss == "policy"
    options = config.trained.loss_options
    assert (options["clip_high"], options["horizon"], options["temperature"]) == (0.28, 12, 0.7)
    loss_of(config.trained)


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_every_correction_of_the_section_is_one_of_the_loss(correction: str) -> None:
    config = resolved(f"grpo.correction={correction}")
    loss_of(config.trained)


def test_the_resolved_config_is_a_config() -> None:
    config = resolved()
    assert build_run_config(config.model_dump(mode="json")) == config


def test_a_frozen_model_is_there_where_it_is_compared_with() -> None:
    assert resolved().companion is None
    assert resolved("grpo.kl_weight=0.1").companion is not None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("grpo.rewards=[{name: exact, weight: 0}]", "nothing would be learned"),
        ("grpo.rewards=[{name: exact}, {name: exact}]", "give them titles"),
        ("grpo.rewards=[{name: exact, title: mean}]", "a figure of the whole batch"),
        ("grpo.rewards=[{name: 'my_rewards:failed'}]", "a figure of the whole batch"),
        ("grpo.rewards=[]", "rewards"),
        ("grpo.updates_per_batch=17", "learns from whole groups"),
        ("grpo.group_size=1", "compares an answer with others"),
        ("grpo.group_size=1,grpo.advantage=reinforce_plus_plus,grpo.drop_no_signal=true", "groups of one reward"),
        ("grpo.group_size=1,grpo.advantage=reinforce_plus_plus,grpo.normalise=group", "makes 0 of all"),
        ("grpo.group_size=1,grpo.prompts_per_step=1,grpo.advantage=reinforce_plus_plus", "compared with nothing"),
        ("grpo.dual_clip=3.0,grpo.objective=cispo", "does not read it"),
        ("grpo.ratio=sequence,grpo.objective=reinforce", "has no ratio"),
        ("grpo.rollout.stop_strings=['']", "stop_strings"),
        ("grpo.reference={path: x}", "where kl_weight is above 0"),
        ("grpo.skip_solved=0.2,grpo.skip_hopeless=0.5", "every prompt would be left out"),
        ("grpo.kl_unbiased=true", "weighs the KL of kl_weight"),
        ("grpo.teacher={weight: 1.0}", "a teacher needs a path"),
        ("grpo.teacher={path: x},grpo.kl_weight=0.1", "two frozen models"),
        ("train.rows_per_step=16", "train.rows_per_step is not for recipe grpo"),
        ("train.evaluate_every_steps=10", "which has grpo.held_out.every_steps"),
        ("evaluation.exact_match_prompts=8", "which has grpo.rewards"),
        ("evaluation.max_new_tokens=9", "which has grpo.rollout.max_new_tokens"),
        ("train.steps=null,train.epochs=1", "needs train.steps"),
        ("data.max_example_tokens=510", "do not fit into train.row_tokens"),
        ("data.sources.0.format=messages", "sources"),
        ("model.backend=hf", "definition of ours"),
        ("grpo.rollout.temperature=0", "temperature"),
    ],
)
def test_what_cannot_be_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as told:
        resolved(override)
    assert said in str(told.value)


def test_a_loss_of_ones_own_with_a_kl_has_a_reference() -> None:
    own = "train.loss=my_losses:Mine,train.loss_options="
    assert resolved(own + "{kl_weight: 0.1}").companion == FrozenPolicy()
    assert resolved(own + "{kl_weight: 0.1},grpo.reference={path: x}").companion == FrozenPolicy(path="x")
    for options in ("{}", "{kl_weight: 0}", "{kl_weight: adaptive}"):
        assert resolved(own + options).companion is None
    with pytest.raises(ConfigError, match="two frozen models"):
        resolved(own + "{kl_weight: 0.1},grpo.teacher={path: x}")


def test_other_recipes_have_no_such_section() -> None:
    raw = resolved().model_dump(mode="json")
    with pytest.raises(ConfigError, match="section grpo is for recipe grpo"):
        build_run_config({**raw, "recipe": "sft", "train": {"steps": 3, "row_tokens": 512}})


@pytest.mark.parametrize(
    ("recipe", "override", "option", "value"),
    [
        ("grpo", "grpo.kl_weight=0.25", "kl_weight", 0.25),
        ("dpo", "dpo.beta=0.3", "beta", 0.3),
        ("reward", "reward.centre=0.5", "centre", 0.5),
        ("distill", "distill.temperature=2.0", "temperature", 2.0),
    ],
)
def test_an_override_of_a_resolved_config_reaches_the_loss(
    recipe: str, override: str, option: str, value: float, tmp_path: Path
) -> None:
    """As a flow has it: its parser resolves the run file, and --set comes after."""
    teacher = [f"distill.teacher.path={tmp_path}"] if recipe == "distill" else []  # a folder: no run is looked for
    read = load_run_config(PROJECT_ROOT / "configs" / recipe / "default.yaml", teacher)
    overridden = RunConfig.model_validate(resolve(read.model_dump(mode="json"), override))
    assert overridden.trained.loss_options[option] == value
    assert overridden.train == read.train
    for step in (train, evaluate):
        assert step.settings(overridden) != step.settings(read)
