"""The vocabulary section: which tokens it names, in which order, and what it refuses."""

from typing import Any

import pytest

from posttrain_lib.config.load import build_run_config
from posttrain_lib.config.model import Vocabulary
from posttrain_lib.errors import ConfigError

RAW: dict[str, Any] = {
    "name": "test",
    "data": {"sources": [{"name": "a", "path": "rows.jsonl"}], "max_example_tokens": 64},
    "model": {"path": "somewhere"},
    "train": {"steps": 10, "row_tokens": 64},
}


def vocabulary(**section: Any) -> Vocabulary:
    return build_run_config({**RAW, "model": {"path": "somewhere", "vocabulary": section}}).model.vocabulary


def test_nothing_is_added_by_default() -> None:
    assert vocabulary().new_tokens() == [] and vocabulary().pad_to_multiple_of == 64


def test_single_tokens_come_first_then_blocks_in_order() -> None:
    section = vocabulary(
        add_tokens=["<|item|>", {"token": "<plus>", "special": False, "description": "plus"}],
        add_blocks=[{"format": "<a_{n}>", "count": 2}, {"format": "<b_{n}>", "count": 1, "description": "item {n}"}],
    )
    found = section.new_tokens()
    assert section.count() == len(found)
    assert [(token.token, token.special, token.description) for token in found] == [
        ("<|item|>", True, None),
        ("<plus>", False, "plus"),
        ("<a_0>", False, None),
        ("<a_1>", False, None),
        ("<b_0>", False, "item 0"),
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
        ({"add_blocks": [{"format": "<a>", "count": 2}]}, "needs {n}"),
        ({"add_blocks": [{"format": "<a_{n}>", "count": 0}]}, "count"),
        ({"add_tokens": ["<a_1>"], "add_blocks": [{"format": "<a_{n}>", "count": 2}]}, "name tokens twice: <a_1>"),
        ({"add_tokens": [""]}, "token"),
        ({"add_tokens": "<a>"}, "add_tokens"),
        ({"initialise": "zero"}, "initialise"),
        ({"noise": -1}, "noise"),
        ({"add_token": ["<a>"]}, "did you mean 'add_tokens'"),
    ],
)
def test_what_cannot_be_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        vocabulary(**section)
    assert message in str(caught.value)


def test_new_tokens_and_another_tokenizer_contradict_each_other() -> None:
    raw = {**RAW, "data": {**RAW["data"], "tokenizer": "elsewhere"}}
    build_run_config(raw)
    with pytest.raises(ConfigError, match=r"leave data\.tokenizer out"):
        build_run_config({**raw, "model": {"path": "somewhere", "vocabulary": {"add_tokens": ["<a>"]}}})
