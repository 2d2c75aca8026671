"""Recipes beyond SFT in the run file: the section says which loss it is, and what contradicts it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.config.run import RunConfig
from posttrain_lib.errors import ConfigError
from posttrain_lib.losses import loss_of

#: documents lie over two devices
TWO_PARTS = {"devices_per_node": 2, "mesh": {"context": 2}}


def config_of(recipe: str, **sections: Any) -> RunConfig:
    source = {"name": "a", "path": "rows.jsonl", "format": "messages" if recipe == "distill" else "preference"}
    raw: dict[str, Any] = {
        "recipe": recipe,
        "name": "test",
        "data": {"sources": [source], "max_example_tokens": 64},
        "model": {"path": "model"},
        "train": {"steps": 10, "row_tokens": 64},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return build_run_config(raw)


@pytest.mark.parametrize("variant", ["sigmoid", "ipo", "hinge", "apo_zero", "apo_down", "simpo", "orpo", "kto"])
def test_every_variant_is_a_loss_that_takes_its_options(variant: str) -> None:
    train = config_of("dpo", dpo={"variant": variant, "beta": 0.3}).trained
    loss = loss_of(train)
    assert (loss.kind, loss.beta) == ("pair", 0.3)
    assert loss.needs == (None if variant in ("simpo", "orpo") else "reference")


def test_simpo_begins_where_its_paper_does() -> None:
    assert config_of("dpo", dpo={"variant": "simpo"}).trained.loss_options == {
        "beta": 2.0,
        "target_margin": 1.0,
        "sft_weight": 0.0,
    }
    assert config_of("dpo", dpo={"variant": "simpo", "target_margin": 0}).trained.loss_options["target_margin"] == 0


def test_the_section_is_the_loss_and_stays_so_when_the_config_is_read_again() -> None:
    smoothed = config_of("dpo", dpo={"variant": "robust", "label_smoothing": 0.1, "sft_weight": 0.5})
    assert smoothed.trained.loss_options["label_smoothing"] == 0.1
    assert (smoothed.train.loss, smoothed.train.loss_options) == (None, {})  # the user said no more
    assert RunConfig.model_validate(smoothed.model_dump(mode="json")) == smoothed
    assert config_of("reward", reward={"centre": 0.01}).trained.loss_options["centre"] == 0.01
    distilled = config_of("distill", distill={"teacher": {"path": "t"}, "temperature": 2.0})
    assert (distilled.trained.loss, distilled.trained.loss_options["temperature"]) == ("distill", 2.0)


def test_without_a_section_it_is_sft() -> None:
    trained = config_of("sft", train={"loss_options": {"z_loss": 0.1}}).trained
    assert (trained.loss, trained.loss_options) == ("sft", {"z_loss": 0.1})


def test_a_loss_of_ones_own_takes_the_place_of_the_recipes() -> None:
    own = config_of("dpo", train={"loss": "my.losses:Mine", "loss_options": {"a": 1}})
    assert (own.trained.loss, own.trained.loss_options) == ("my.losses:Mine", {"a": 1})
    assert RunConfig.model_validate(own.model_dump(mode="json")) == own
    assert config_of("dpo", train={"loss": "sft"}).trained.loss == "sft"
    beside = config_of("dpo", train={"loss": "my.losses:Mine"}, dpo={"variant": "simpo"})
    assert beside.companion is None


@pytest.mark.parametrize(
    ("recipe", "sections", "said"),
    [
        ("sft", {"dpo": {}}, "section dpo is for recipe dpo"),
        ("distill", {}, "needs a section distill"),
        ("dpo", {"dpo": {"vraiant": "ipo"}}, "variant"),
        ("dpo", {"dpo": {"variant": "sigmod"}}, "sigmoid"),
        ("dpo", {"dpo": {"variant": "ipo", "label_smoothing": 0.1}}, "label_smoothing is for"),
        ("dpo", {"dpo": {"variant": "robust"}}, "robust needs label_smoothing"),
        ("dpo", {"dpo": {"target_margin": 1.0}}, "target_margin is for variant simpo"),
        ("dpo", {"dpo": {"desirable_weight": 2.0}}, "are for variant kto, not sigmoid"),
        ("dpo", {"dpo": {"variant": "simpo", "reference": {"kept": "live"}}}, "reference is not for variant simpo"),
        ("dpo", {"dpo": {"variant": "orpo", "reference": {"path": "x"}}}, "reference is not for variant orpo"),
        ("dpo", {"train": {"loss_options": {"beta": 0.3}}}, "give them there"),
        ("distill", {"distill": {"teacher": {"path": "t"}, "mix": 0.3}}, "mix is for divergence jensen_shannon"),
        ("distill", {"distill": {"teacher": {"path": "t", "top_k": 8}}}, "top_k is of kept: stored"),
        ("reward", {"evaluation": {"tasks": [{"task": "perplexity"}]}}, "leave the task perplexity out"),
        ("dpo", {"dpo": {"variant": "kto", "sft_weight": 1.0}}, "sft_weight is not for variant kto"),
        ("dpo", {"dpo": {"variant": "orpo", "length_normalise": False}}, "length_normalise is not for"),
        ("dpo", {"dpo": {"reference": {"kept": "base"}}}, "needs model.lora"),
        ("dpo", {"dpo": {"reference": {"kept": "base", "path": "x"}}}, "leave path out"),
        ("dpo", {"train": {"loss": "dpo", "loss_options": {"beta": 9.0}}}, "contradicts section dpo"),
        ("dpo", {"dpo": {"beta": 0.3}, "train": {"loss": "my.losses:Mine"}}, "leave dpo.beta out"),
        ("reward", {"reward": {"centre": 0.1}, "train": {"loss": "my.losses:Mine"}}, "leave reward.centre out"),
        ("dpo", {"compute": TWO_PARTS}, "context: 1"),
        (
            "distill",
            {"distill": {"teacher": {"path": "t", "kept": "stored"}}, "compute": TWO_PARTS},
            "context: 1, or distill.teacher.kept: live",
        ),
        ("reward", {"model": {"backend": "hf"}}, "backend: native"),
        ("reward", {"evaluation": {"exact_match_prompts": 10}}, "writes nothing"),
        ("distill", {"distill": {"teacher": {"path": "t", "kept": "stored"}, "divergence": "reverse"}}, "kept: live"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: str, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(recipe, **sections)


def test_a_live_teachers_documents_may_lie_over_devices() -> None:
    config = config_of("distill", distill={"teacher": {"path": "t"}}, compute=TWO_PARTS)
    assert config.compute.mesh.context == 2
