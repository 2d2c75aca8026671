"""A small model with a chat tokenizer, and prompts for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain_lib.checkpoint.hf import load_hf_weights
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.models.decoder import Decoder, build_model
from posttrain_lib.models.families import spec_from_folder
from tests.oracles.tiny_job import write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random weights, and a byte-level tokenizer with its chat template."""
    folder = tmp_path_factory.mktemp("small") / "model"
    write_model(folder, vocab_size=320, max_position_embeddings=512)
    build_tokenizer((turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 320, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer(folder)


@pytest.fixture(scope="session")
def small(folder: Path) -> Decoder:
    """In float64: no near ties. Do not change it."""
    spec = spec_from_folder(folder)
    model = build_model(spec, dtype=torch.float64)
    load_hf_weights(model, spec, folder)
    return model.requires_grad_(False)
