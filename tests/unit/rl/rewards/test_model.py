"""A reward model as grader: transformers' scores, as the README.md of an exported folder has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ConfigError
from posttrain_lib.rl.rewards.base import RewardSpec, make_grader
from posttrain_lib.rl.rewards.pool import GraderPool
from tests.oracles.tiny_job import write_model
from tests.support.graders import answer


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(
        tmp_path_factory.mktemp("judge") / "model",
        3,
        architectures=["Qwen3ForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        tie_word_embeddings=False,
        vocab_size=320,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    build_tokenizer((turn["content"] for row in generate_rows(50, 0) for turn in row["messages"]), 320, folder)
    return folder


def test_scores_are_transformers_own(judge: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["Yes.", "No, never, in no case at all.", "", "\u00fc " * 20, "Yes."]
    refused = answer("x")
    refused = type(refused)(({"role": "nobody", "content": "?"},), "x", None)
    pool = GraderPool([RewardSpec("model", "judge", options={"folder": str(judge)}, deadline_seconds=100.0)], batch=3)
    try:
        grades = pool.grade([*(answer(text) for text in texts), refused])
    finally:
        pool.close()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = AutoModelForSequenceClassification.from_pretrained(judge, attn_implementation="eager").eval()
    for text, grade in zip(texts, grades, strict=False):
        messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        inputs = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            expected = float(model(**inputs).logits[0, 0])
        # scores of order 1 after 2 layers in float32, whose products sum in another order in a packed row
        assert grade.reward == pytest.approx(expected, abs=1e-5) and grade.correct is None
    rewards = [grade.reward for grade in grades]
    assert len({round(reward, 3) for reward in rewards[:4] if reward is not None}) == 4
    assert grades[5].failure is not None and grades[5].failure.startswith("judge: raised RefusedRow")
    assert pool.counts == {"judge: raised RefusedRow": 1}


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        make_grader(RewardSpec("model", "judge", options={"folder": str(tmp_path / "none")}))
