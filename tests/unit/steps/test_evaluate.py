"""The step's own part of an evaluation; what it measures with is tested in tests/unit/evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.evaluation.frozen import store_document_logprobs
from posttrain_lib.evaluation.model import load_model
from posttrain_lib.losses.contract import write_examples
from posttrain_lib.schema.manifests import ArtifactRef
from steps import evaluate
from steps.base import StepContext
from tests.oracles.tiny_job import write_model
from tests.support.exported import RAW


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_that_is_the_stored_reference_has_not_moved(tmp_path: Path, precision: str) -> None:
    write_model(tmp_path / "model", vocab_size=320)
    build_tokenizer(
        (turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 320, tmp_path / "model"
    )
    model, store = load_model(tmp_path / "model"), write_examples(tmp_path / "held_out", "pair", 0)
    made_of = {"model": "digest"}
    store_document_logprobs(model, store, tmp_path / "signals", made_of, row_tokens=320, precision=precision)
    train = {**RAW["train"], "row_tokens": 320, "precision": precision}
    asked = {"samples": 0}
    config = build_run_config({**RAW, "recipe": "dpo", "train": train, "evaluation": asked})
    folders = {"held_out": "held_out", "signals:train": "signals", "signals:held_out": "signals", "companion": "model"}
    inputs = {name: ArtifactRef(str(tmp_path / folder), "", "digest") for name, folder in folders.items()}
    context = StepContext(config, inputs, tmp_path, tmp_path, print, print)
    found = evaluate._evaluate(context, model, ChatTokenizer(tmp_path / "model"), [], {}).held_out.figures
    assert (found["kl"], found["rewards/margin"], found["rewards/accuracy"]) == (0.0, 0.0, 0.0)
