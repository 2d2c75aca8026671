"""What a config alone tells is told before a run begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.config import RunConfig
from posttrain_lib.config.load import build_run_config
from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.formats import FORMATS, get_format
from posttrain_lib.data.making import make
from posttrain_lib.embedded.conversations import generate_rows
from posttrain_lib.embedded.tokenizer import build_tokenizer
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.losses.sft import SFTLoss
from steps import foresight

#: a row of each format
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Who?", "output": "Tom."},
    "calculations": {"prompt": "How many?", "solution": "1+2=<<1+2=3>>3"},
    "messages": {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]},
    "preference": {"prompt": "Who?", "chosen": "Tom.", "rejected": "Ann."},
    "prompt_completion": {"prompt": "Who?", "completion": "Tom."},
    "prompts": {"prompt": "Who?", "answer": "Tom."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Tom."}]},
    "text": {"text": "Tom."},
    "tokens": {"token_ids": [1, 2, 3], "mask": [0, 1, 1]},
}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer((turn["content"] for row in generate_rows(20, 0) for turn in row["messages"]), 320, folder)
    return ChatTokenizer(folder)


class PairLoss(SFTLoss):
    """Of a loss, what decides beforehand."""

    kind = "pair"


def config_of(**sections: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "name": "test",
        "data": {"sources": [{"name": "a", "generate": {"rows": 10}}], "max_example_tokens": 64},
        "model": {"from_scratch": {"architecture": {}}},
        "train": {"steps": 10, "row_tokens": 64},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return build_run_config(raw)


def test_a_plain_run_is_let_through() -> None:
    foresight.check_names(config_of())


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_kind_of_a_format_is_what_its_rows_become(name: str, chatml: ChatTokenizer) -> None:
    settings = config_of(data={"max_example_tokens": 512}, train={"row_tokens": 512}).data
    made = make(chatml, get_format(name)(ROWS[name], "a", "rows:1", None, {}), settings)
    kind = "document" if made.kind == "documents" else made.kind  # several of one row
    assert foresight._KINDS.get(name, "document") == kind


def test_a_loss_says_what_it_learns_from(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["preference"]) + "\n")
    path = str(tmp_path / "rows.jsonl")
    pairs = {"sources": [{"name": "a", "path": path, "format": "preference"}]}
    scratch = {"from_scratch": {"architecture": {}, "tokenizer": "anywhere"}}
    with pytest.raises(ConfigError, match="learns from documents") as caught:
        foresight.check_start(config_of(data=pairs, model=scratch))
    assert "recipes dpo and reward train on pairs" in str(caught.value.fix)
    own = {"loss": f"{__name__}:PairLoss"}
    foresight.check_start(config_of(data=pairs, model=scratch, train=own))
    with pytest.raises(ConfigError, match="learns from pairs"):
        foresight.check_start(config_of(train=own))


def test_a_tokenizer_needs_rows_to_be_made_of() -> None:
    found = {"sources": [{"name": "a", "path": "rows.jsonl"}]}
    with pytest.raises(ConfigError, match="no generated source") as caught:
        foresight.check_start(config_of(data=found))
    assert caught.value.where == "model.from_scratch.tokenizer"


@pytest.mark.parametrize(
    ("sections", "where", "said"),
    [
        ({"train": {"optimizer": {"options": {"x": 1}}}}, "train.optimizer.options", "unexpected keyword argument 'x'"),
        ({"train": {"optimizer": {"options": {"foraech": True}}}}, "train.optimizer.options", "mean 'foreach'"),
        ({"train": {"mixture": {"sources": {"a": {"weight": 0}}}}}, "train.mixture.sources", "step 1: all are 0"),
        (
            {"train": {"mixture": {"sources": {"a": {"weight": [[1, 0], [5, 1], [9, 0]]}}}}},
            "train.mixture.sources",
            "step 1: all are 0",
        ),
        ({"compute": {"launcher": "in_process", "address": "host:1"}}, "compute.address", "in_process"),
    ],
    ids=["option", "near option", "no weight", "none at first", "address"],
)
def test_what_surely_fails_is_refused_by_field(sections: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        foresight.check_names(config_of(**sections))
    assert caught.value.where == where and said in str(caught.value)


def test_options_and_weights_that_can_be_are_let_through() -> None:
    weights = {"sources": {"a": {"weight": [[1, 1], [9, 0.5]]}}}
    foresight.check_names(config_of(train={"mixture": weights, "optimizer": {"options": {"amsgrad": True}}}))
    foresight.check_names(config_of(train={"mixture": {}}))


def test_a_device_is_looked_for_where_the_run_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        foresight.check_names(config_of(compute={"device": "cuda"}))
    foresight.check_names(config_of(compute={"device": "cuda", "address": "host:1"}))


def test_a_template_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="template cannot be read"):
        foresight.check_names(config_of(data={"chat_template": "/nowhere/own.jinja"}))


@pytest.mark.parametrize("what", ["events", "lookups"])
def test_a_format_in_which_nothing_is_generated_is_refused(what: str) -> None:
    source = {"name": "a", "generate": {"rows": 10, "of": what}, "format": "sharegpt"}
    config = config_of(data={"sources": [source], "max_example_tokens": 64})
    with pytest.raises(ConfigError, match="no rows of this format are generated") as caught:
        foresight.check_start(config)
    assert (caught.value.where, caught.value.got) == ("data.sources: a: format", "sharegpt")
    assert "messages or " in str(caught.value.expected)
