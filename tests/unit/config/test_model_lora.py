"""Adapters and new tokens in one run: the new rows are trained, or the run file says that they are not."""

from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.config.model import Lora
from posttrain_lib.errors import ConfigError

RAW: dict[str, Any] = {
    "name": "test",
    "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 64},
    "train": {"steps": 10, "row_tokens": 64},
}
ONE = {"add_tokens": ["<plan>"]}
BLOCK = {"add_blocks": [{"format": "<item_{n}>", "count": 5}]}


def lora(vocabulary: dict[str, Any], **section: Any) -> Lora | None:
    model = {"path": "somewhere", "vocabulary": vocabulary, "lora": section}
    return build_run_config({**RAW, "model": model}).model.lora


@pytest.mark.parametrize(
    ("vocabulary", "section", "parts"),
    [
        (ONE, {}, ["rows of the 1 new tokens", "lack embedding and head", "[attention, mlp, embedding, head]"]),
        (BLOCK, {"targets": ["q_proj"]}, ["rows of the 5 new tokens", "[q_proj, embedding, head]"]),
        (ONE, {"targets": ["mlp", "embedding"]}, ["lack head:", "[mlp, embedding, head]"]),
        (ONE, {"targets": ["mlp", "lm_head"]}, ["lack embedding:", "[mlp, lm_head, embedding]"]),
        (ONE, {"dora": True}, ["dora: false and lora.targets: [attention, mlp, embedding, head]"]),
    ],
)
def test_rows_that_nothing_would_train_are_refused_with_the_cure(
    vocabulary: dict[str, Any], section: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        lora(vocabulary, **section)
    for part in [*parts, "lora.freeze_new_tokens: true"]:
        assert part in str(caught.value)


@pytest.mark.parametrize("targets", [["attention", "embedding", "head"], ["embed_tokens", "lm_head"]])
def test_targets_that_train_them_pass(targets: list[str]) -> None:
    assert lora(ONE, targets=targets) is not None


def test_frozen_ones_are_taken_when_the_run_file_says_so() -> None:
    kept = lora(ONE, freeze_new_tokens=True, dora=True)
    assert kept is not None and kept.targets == ("attention", "mlp")
    assert lora({}) is not None, "without new tokens there is nothing to say"


@pytest.mark.parametrize("targets", [["attention", "embedding"], ["lm_head"]])
def test_frozen_rows_that_are_trained_contradict_themselves(targets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"freeze_new_tokens: true contradicts"):
        lora(ONE, targets=targets, freeze_new_tokens=True)
