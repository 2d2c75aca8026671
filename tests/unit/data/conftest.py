"""Tokenizers for the data tests: the embedded one, and real vocabularies with the markers that a template needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from tests.unit.data.real_templates import OWN_TOKENIZER, with_markers


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default's tokenizer: byte-level BPE, ChatML template that never rewrites a turn."""
    folder = tmp_path_factory.mktemp("chatml")
    texts = (message["content"] for row in generate_rows(300, 0) for message in row["messages"])
    build_tokenizer(texts, 512, folder)
    return folder


@pytest.fixture(scope="session")
def chatml(chatml_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(chatml_folder)


@pytest.fixture
def with_template(chatml_folder: Path, tmp_path: Path) -> Callable[..., ChatTokenizer]:
    """The embedded vocabulary with a template of the test's own."""

    def make(template: str, **settings: object) -> ChatTokenizer:
        path = tmp_path / "template.jinja"
        path.write_text(template, encoding="utf-8")
        return ChatTokenizer(chatml_folder, chat_template=path, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def real_tokenizer(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatTokenizer]:
    """Name in EVERY_TEMPLATE -> tokenizer; Qwen2.5's vocabulary with markers added where its own is not at hand."""
    root, made = tmp_path_factory.mktemp("tokenizers"), dict[str, ChatTokenizer]()

    def make(name: str) -> ChatTokenizer:
        if name in OWN_TOKENIZER:
            return ChatTokenizer(real_data / "tokenizers" / name)
        template = real_data / "chat_templates" / f"{name}.jinja"
        return ChatTokenizer(with_markers(real_data / "tokenizers" / "qwen2.5", template, root / name))

    def tokenizer(name: str) -> ChatTokenizer:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return tokenizer
