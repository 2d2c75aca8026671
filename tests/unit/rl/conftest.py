"""What tests of reinforcement learning share."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from tests.support.dialogues import tokenizer_of, write_talker


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model with the embedded template. Do not change it."""
    return write_talker(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="session")
def tokenizer(talker: Path) -> ChatTokenizer:
    return tokenizer_of(talker)
