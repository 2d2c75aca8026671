"""The environment's bounds fit the rows that training packs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config import load_run_config
from posttrain_lib.errors import ConfigError
from steps import rollouts

DEFAULT = Path(__file__).resolve().parents[3] / "configs" / "grpo" / "default.yaml"


def test_an_episode_has_a_rows_tokens_unless_it_is_said() -> None:
    for tokens, expected in ((None, 512), (256, 256)):
        config = load_run_config(DEFAULT, [f"grpo.environment={{name: calculator, max_tokens: {tokens or 'null'}}}"])
        environment = rollouts.environment(config)
        assert environment is not None and environment.max_tokens == expected and environment.max_turns == 8
        assert rollouts.longest_prompt(config) == expected - 12
        assert rollouts.settings(config)["environment"]["name"] == "calculator"
    bare = load_run_config(DEFAULT, [])
    assert rollouts.environment(bare) is None and rollouts.longest_prompt(bare) == 500


@pytest.mark.parametrize("tokens", [12, 513])
def test_an_episode_that_does_not_fit_is_refused(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        load_run_config(DEFAULT, [f"grpo.environment={{name: calculator, max_tokens: {tokens}}}"])
