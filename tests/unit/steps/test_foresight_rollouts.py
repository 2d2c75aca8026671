"""What a run of rollouts cannot be made of is told before it begins, and not behind its warm start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import load_run_config
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from posttrain_lib.schema.manifests import ArtifactRef, StepManifest
from steps import foresight, rollouts

#: a name of this module that nobody can call
VALUE = 3


def changed(**changes: Any) -> RunConfig:
    """The default run file, with fields of its section grpo replaced."""
    config = load_run_config(PROJECT_ROOT / "configs" / "grpo" / "default.yaml", [])
    assert config.grpo is not None
    raw = config.model_dump(mode="json", exclude_unset=True)
    raw["grpo"] = {**raw["grpo"], **changes}
    return RunConfig.model_validate(raw)


def check(**changes: Any) -> None:
    foresight.check_names(changed(**changes))


def test_the_default_is_fine() -> None:
    check()
    check(environment={"name": "calculator"}, constraint={"name": "trie", "options": {"entries": ["a"]}})
    check(rollout={"engine": "vllm", "options": {"options": {"enforce_eager": True}, "slots": 4}})
    check(advantage="verl:opo")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"constraint": {"name": "tri"}}, "constraint"),
        ({"constraint": {"name": "trie", "options": {"words": []}}}, "constraint does not take"),
        ({"environment": {"name": "calculater"}}, "environment"),
        ({"environment": {"name": "calculator", "options": {"digits": 3}}}, "environment does not take"),
        ({"rollout": {"engine": "vllm", "options": {"tensor_parallel": 3}}}, "engine does not take"),
        ({"rollout": {"options": {"slot": 3}}}, "engine does not take"),
        ({"rollout": {"options": {"slots": -1}}}, "needs slots"),
        ({"rollout": {"options": {"dtype": "float16"}}}, "does not compute in this dtype"),
        ({"constraint": {"name": "trie"}}, "the run's, or each row's"),
        ({"rewards": [{"name": "regex", "options": {"pattern": "(("}}]}, "pattern cannot be read"),
        ({"rewards": [{"name": "overlong", "options": {"max_tokens": 4, "cache": 256}}]}, "punishment"),
        ({"rewards": [{"name": "http", "options": {"url": 7}}]}, "grader cannot be made"),
        ({"rewards": [{"name": f"{__name__}:VALUE"}]}, "nothing that can be called"),
        ({"advantage": f"{__name__}:VALUE"}, "nothing that can be called"),
        ({"advantage": f"{__name__}:changed"}, "advantage rule does not take"),
        ({"advantage": "verl:opoo"}, "verl has no such advantage estimator"),
    ],
)
def test_what_cannot_be_made_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(**changes)


@pytest.mark.parametrize(
    ("answers", "rewards", "refused"),
    [
        ((None, None), ["exact", "maths"], True),
        ((None, None), [{"name": "regex", "options": {"pattern": "is (?P<answer>.*)"}}, "format"], True),
        ((None, None), [{"name": "regex", "options": {"pattern": "is (.*)"}}, "format"], False),
        ((None, "4"), ["exact", "maths"], False),
        ((None, None), ["format", f"{__name__}:length"], False),
    ],
)
def test_rewards_that_compare_with_answers_need_some(
    tmp_path: Path, answers: tuple[str | None, ...], rewards: list[str | dict[str, Any]], refused: bool
) -> None:
    rows = [
        {"prompt_ids": [1], "messages": [], "answer": answer, "source": "a", "row_id": f"f:{place}"}
        for place, answer in enumerate(answers)
    ]
    (tmp_path / "prompts").write_text("\n".join(map(json.dumps, rows)))
    prepared = StepManifest(
        "prepare_data", 1, "k" * 64, config={}, inputs={}, environment={}, code={}, key_parts={}, checks=(), metrics={},
        outputs={"train_prompts": ArtifactRef(str(tmp_path / "prompts"), "prompts", "0" * 64)},
        started_at="2026-01-01T00:00:00", seconds=1.0,
    )  # fmt: skip
    options = {"format": {"tags": ["think"]}}
    config = changed(
        rewards=[
            each if isinstance(each, dict) else {"name": each, "options": options.get(each, {})} for each in rewards
        ]
    )
    if not refused:
        rollouts.check_answers(config, {"prepare_data": prepared})
        return
    with pytest.raises(DataError, match="no prompt has an answer") as caught:
        rollouts.check_answers(config, {"prepare_data": prepared})
    needing = [each if isinstance(each, str) else each["name"] for each in rewards if each != "format"]
    assert f"rewards: {', '.join(needing)}" in str(caught.value) and "a: f:0" in str(caught.value)


def length(answer: object) -> float:
    """A reward that compares with nothing."""
    return 1.0
