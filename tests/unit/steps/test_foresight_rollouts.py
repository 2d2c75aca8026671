"""What a run of rollouts cannot be made of is told before it begins, and not behind its warm start."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_lib.config.load import load_run_config
from posttrain_lib.errors import ConfigError
from posttrain_lib.lineage.source_digest import PROJECT_ROOT
from steps import foresight

#: a name of this module that nobody can call
VALUE = 3


def check(**changes: Any) -> None:
    """The names of the default run file, with fields of its section grpo replaced."""
    config = load_run_config(PROJECT_ROOT / "configs" / "grpo" / "default.yaml", [])
    assert config.grpo is not None
    raw = config.model_dump(mode="json", exclude_unset=True)
    raw["grpo"] = {**raw["grpo"], **changes}
    foresight.check_names(type(config).model_validate(raw))


def test_the_default_is_fine() -> None:
    check()
    check(environment={"name": "calculator"}, constraint={"name": "trie", "options": {"entries": ["a"]}})
    check(rollout={"engine": "vllm", "options": {"options": {"enforce_eager": True}, "slots": 4}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"constraint": {"name": "tri"}}, "constraint"),
        ({"constraint": {"name": "trie", "options": {"words": []}}}, "constraint does not take"),
        ({"environment": {"name": "calculater"}}, "environment"),
        ({"environment": {"name": "calculator", "options": {"digits": 3}}}, "environment does not take"),
        ({"rollout": {"engine": "vllm", "options": {"tensor_parallel": 3}}}, "engine does not take"),
        ({"rollout": {"options": {"slot": 3}}}, "engine does not take"),
        ({"rewards": [{"name": "regex", "options": {"pattern": "(("}}]}, "pattern cannot be read"),
        ({"rewards": [{"name": "overlong", "options": {"max_tokens": 4, "cache": 256}}]}, "punishment"),
        ({"rewards": [{"name": "http", "options": {"url": 7}}]}, "grader cannot be made"),
        ({"rewards": [{"name": f"{__name__}:VALUE"}]}, "nothing that can be called"),
    ],
)
def test_what_cannot_be_made_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(**changes)
