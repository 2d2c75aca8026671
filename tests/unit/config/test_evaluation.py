"""The evaluation section: tasks and gates, strict, with the nearest right key."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_lib.config import RunConfig
from posttrain_lib.config.evaluation import TASK_NAMES
from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import ConfigError
from posttrain_lib.evaluation.tasks import TASKS


def config_of(**evaluation: Any) -> RunConfig:
    return build_run_config(
        {
            "name": "test",
            "data": {"sources": [{"name": "a", "generate": {"rows": 10}}], "max_example_tokens": 64},
            "model": {"from_scratch": {"architecture": {}}},
            "train": {"steps": 10, "row_tokens": 64},
            "evaluation": evaluation,
        }
    )


CHOICE = {"task": "multiple_choice", "file": "q.jsonl", "fields": {"prompt": "question"}}


def test_every_task_of_the_table_has_a_section() -> None:
    assert set(TASK_NAMES) == set(TASKS)


def test_tasks_survive_the_way_through_a_flow() -> None:
    own = {"task": "my.module:Own", "options": {"size": 2}}
    config = config_of(
        tasks=[CHOICE, {"task": "perplexity"}, own, {**CHOICE, "name": "again"}],
        gates={"metrics": {"multiple_choice.accuracy": {"min": 0.5}, "held_out.loss": {"max_change": 0}}},
    )
    assert build_run_config(config.model_dump(mode="json")) == config
    assert [task.title for task in config.evaluation.tasks] == ["multiple_choice", "perplexity", "Own", "again"]
    assert config.evaluation.tasks[0].arguments() == {
        "file": "q.jsonl", "fields": {"prompt": "question"}, "chat": False, "before_choice": " ",
    }  # fmt: skip
    assert config.evaluation.tasks[2].arguments() == {"size": 2}


def test_a_gate_may_be_on_a_task_whose_attribute_has_a_dot() -> None:
    gates = {"metrics": {"make.score": {"min": 0.5}}}
    assert config_of(tasks=[{"task": "my.module:Own.make"}], gates=gates).evaluation.tasks[0].title == "make"


@pytest.mark.parametrize(
    ("evaluation", "what", "fix"),
    [
        ({"tasks": [{"task": "multiple_choice", "fil": "x"}]}, "unknown key 'evaluation.tasks.0.multi", "'file'"),
        ({"tasks": [{**CHOICE, "fields": {"promt": "q"}}]}, "unknown key", "'prompt'"),
        ({"tasks": [{"task": "multiple_chice", "file": "x"}]}, "unknown task 'multiple_chice'", "'multiple_choice'"),
        ({"tasks": [{"task": "a.b:C", "optins": {}}]}, "unknown key 'evaluation.tasks.0.user.optins'", "'options'"),
        ({"tasks": [{"file": "x"}]}, "unknown task None", "name one"),
        ({"tasks": [{"task": "pass_at_k", "k": [9]}]}, "needs at least 9 samples", None),
        ({"tasks": [{**CHOICE, "chat": True, "before_choice": "\n"}]}, "before_choice is not for chat: true", None),
        ({"tasks": [{"task": "win_rate", "scorer": "m:f", "top_p": 0.5}]}, "top_p is of sampling", None),
        ({"tasks": [{"task": "pass_at_k", "verifier": "m:f", "extract": "gsm8k"}]}, "extract is for verifier", None),
        ({"tasks": [CHOICE, CHOICE]}, "several tasks are called 'multiple_choice'", None),
        ({"tasks": [{"task": "perplexity", "name": "held_out"}]}, "held-out loss's own", None),
        (
            {"tasks": [CHOICE], "gates": {"metrics": {"multiple_choce.accuracy": {"min": 0.5}}}},
            "gates.metrics names 'multiple_choce.accuracy'",
            "'multiple_choice'",
        ),
        ({"gates": {"metrics": {"held_out.loss": {"mx": 1}}}}, "unknown key", "'max'"),
        ({"gates": {"metrics": {"held_out.loss": {}}}}, "a gate demands something", None),
        ({"lm_eval": {"taks": ["a"]}}, "unknown key 'evaluation.lm_eval.taks'", "'tasks'"),
    ],
)
def test_what_cannot_be_is_refused(evaluation: dict[str, Any], what: str, fix: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**evaluation)
    assert what in str(caught.value)
    assert fix is None or fix in str(caught.value.fix)
