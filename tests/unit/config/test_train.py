"""The ``train`` section's choices."""

from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.errors import ConfigError
from tests.unit.config.test_load import MINIMAL


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activation_checkpointing_says_how_much(mode: str) -> None:
    assert build_run_config(MINIMAL, overrides=[f"train.activation_checkpointing={mode}"]).train.compile == "none"


@pytest.mark.parametrize(("value", "meant"), [("true", "'full'"), ("false", "'none'"), ("some", "'selective'")])
def test_a_flag_or_another_word_is_refused_with_the_words_that_there_are(value: Any, meant: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing") as caught:
        build_run_config(MINIMAL, overrides=[f"train.activation_checkpointing={value}"])
    assert meant in str(caught.value)


def test_what_is_compiled_is_named() -> None:
    assert build_run_config(MINIMAL, overrides=["train.compile=blocks"]).train.activation_checkpointing == "none"
    with pytest.raises(ConfigError, match="'none' or 'blocks'"):
        build_run_config(MINIMAL, overrides=["train.compile=true"])
