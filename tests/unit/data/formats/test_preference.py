"""Preference pairs in each of TRL's forms, and prompts for reinforcement learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.data.formats import get_format
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import PreferencePair, Prompt

TOOL = {"type": "function", "function": {"name": "f"}}
#: as a request brings it to a template
TOLD = {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}
ASKED, GOOD, BAD = (
    {"role": role, "content": said} for role, said in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
)
FORMS = [
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD], "margin": 2},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "tools": [TOOL]},
    {"prompt": "a", "prompt_id": "7", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "group": 1},
    {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
]


def pair(row: dict[str, Any]) -> PreferencePair:
    found = get_format("preference")(row, "source", "row:1", "group", {})
    assert isinstance(found, PreferencePair)
    return found


@pytest.mark.parametrize("row", FORMS)
def test_every_form_gives_the_same_pair(row: dict[str, Any]) -> None:
    found = pair(row)
    parts = [
        [(message.role, message.content) for message in part] for part in (found.prompt, found.chosen, found.rejected)
    ]
    assert parts == [[("user", "a")], [("assistant", "b")], [("assistant", "c")]]


def test_what_comes_with_a_pair() -> None:
    found = [pair(row) for row in FORMS]
    assert [made.margin for made in found[:2]] == [2.0, None]
    assert found[2].tools == (TOLD,)
    assert [made.group for made in found[2:4]] == ["user:a", "group:1"]


def test_the_common_start_ends_with_a_question() -> None:
    same = {"role": "assistant", "content": "the same"}
    row = {"chosen": [ASKED, same, ASKED, GOOD], "rejected": [ASKED, same, ASKED, BAD]}
    assert [message.role for message in pair(row).prompt] == ["user", "assistant", "user"]
    later = {"chosen": [ASKED, same, ASKED, GOOD], "rejected": [ASKED, same, {**ASKED, "content": "z"}, BAD]}
    found = pair(later)
    assert [message.role for message in found.prompt] == ["user"]
    assert len(found.chosen) == 3


def test_the_system_text_begins_the_prompt() -> None:
    for row in FORMS:
        for name in ("system", "system_prompt"):
            found = pair({**row, name: "Be terse."})
            assert [(message.role, message.content) for message in found.prompt] == [
                ("system", "Be terse."),
                ("user", "a"),
            ]
    orca = {"system": "", "question": "a", "chosen": "b", "rejected": "c"}
    parse = get_format("preference")
    assert parse(orca, "source", "row:1", "group", {"prompt": "question"}) == pair(FORMS[1])
    told = [{"role": "system", "content": "s"}, ASKED]
    assert len(pair({**FORMS[0], "prompt": told, "system": "s"}).prompt) == 2


def test_whole_conversations_that_begin_with_a_greeting() -> None:
    greeting = {"role": "assistant", "content": "Welcome."}
    found = pair({"chosen": [greeting, ASKED, GOOD], "rejected": [greeting, ASKED, BAD]})
    assert [message.role for message in found.prompt] == ["assistant", "user"]
    assert found.group == "user:a"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"system": "s", "prompt": [{"role": "system", "content": "t"}, ASKED]}, "ambiguous_system"),
        ({"chosen": None}, "no_messages"),
        ({"rejected": []}, "no_messages"),
        ({"chosen": ""}, "empty_assistant_turn"),
        ({"prompt": None}, "no_prompt"),
        ({"prompt": [GOOD]}, "roles_out_of_order"),
        ({"prompt": [ASKED, GOOD]}, "roles_out_of_order"),
        ({"rejected": [GOOD]}, "answers_equal"),
        ({"chosen": [ASKED, GOOD]}, "prompts_differ"),
        ({"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "z"}, BAD]}, "prompts_differ"),
        ({"prompt": "z", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "prompts_differ"),
        ({"chosen": [ASKED], "rejected": [ASKED, BAD]}, "no_assistant_turn"),
        ({"chosen": [GOOD, ASKED]}, "no_assistant_turn"),
        ({"chosen": [GOOD, GOOD]}, "assistant_after_assistant"),
        ({"chosen": [{**GOOD, "weight": 0.5}]}, "bad_weight"),
        ({"margin": "big"}, "bad_margin"),
        ({"margin": float("nan")}, "bad_margin"),
        ({"margin": 1e39}, "bad_margin"),
        ({"margin": None, "margins": 1}, "misspelt_field"),
    ],
)
def test_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedRow) as caught:
        pair({**FORMS[0], **change})
    assert caught.value.reason == reason


def test_real_pairs(real_data: Path) -> None:
    lines = (real_data / "preference" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        try:
            found.append(pair(json.loads(line)))
        except RefusedRow as refusal:
            pytest.fail(f"{refusal} in {line[:200]}")
    assert len(found) == len(lines)
    assert {made.margin is None for made in found} == {True, False}


PROMPTS = [
    {"prompt": "Two and two?", "answer": "4", "level": 1, "empty": None},
    {"prompt": [ASKED, GOOD, ASKED], "answer": 6, "group": "g"},
    {"prompt": "Two and two?", "system": "Be brief.", "tools": [TOOL]},
]


def prompt(row: dict[str, Any], **fields: str) -> Prompt:
    found = get_format("prompts")(row, "source", "row:1", "group", fields)
    assert isinstance(found, Prompt)
    return found


def test_prompts() -> None:
    found = [prompt(row) for row in PROMPTS]
    assert [made.answer for made in found] == ["4", "6", None]
    assert found[0].extra == {"level": 1}
    assert found[1].extra == {"group": "g"}
    assert [len(made.messages) for made in found] == [1, 3, 2]
    assert found[2].tools == (TOLD,)
    assert [made.group for made in found[:2]] == ["user:Two and two?", "group:g"]
    assert prompt({"prompt": "a", "system_prompt": "s", "level": 1}).extra == {"level": 1}
    assert prompt({"prompt": "a", "system_prompt": "s"}).messages[0].role == "system"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no_messages"),
        ({"prompt": " "}, "empty_text"),
        ({"prompt": [ASKED, GOOD]}, "roles_out_of_order"),
        ({"prompt": [{"role": "system", "content": "s"}]}, "roles_out_of_order"),
        ({"prompt": "a", "answer": ["4"]}, "answer_not_text"),
        ({"prompt": "a", "answer": True}, "answer_not_text"),
        ({"prompt": "a", "answers": "4"}, "misspelt_field"),
    ],
)
def test_prompts_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedRow) as caught:
        prompt(row)
    assert caught.value.reason == reason


def test_gsm8k_as_prompts(real_data: Path) -> None:
    for line in (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:50]:
        row = json.loads(line)
        found = prompt(row, prompt="question")
        assert (found.messages[0].content, found.answer, found.extra) == (row["question"], row["answer"], {})
