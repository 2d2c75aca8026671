"""ShareGPT, Alpaca and prompt/completion rows: three rows each, and the reason for everything that is not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_lib.data.formats import get_format
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation


def parsed(name: str, row: dict[str, Any], **fields: str) -> Conversation:
    found = get_format(name)(row, "source", "row:1", "group", fields)
    assert isinstance(found, Conversation)
    return found


def said(conversation: Conversation) -> list[tuple[str, str | None, float]]:
    return [(message.role, message.content, message.loss_weight) for message in conversation.messages]


TOOL = {"type": "function", "function": {"name": "f"}}
#: as a request brings it to a template
TOLD = {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}


CALL = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 2}})}
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {
        "conversations": [
            {"from": "human", "value": "a"}, CALL, {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "Four.", "train": True},
        ],
        "tools": json.dumps([{"name": "add", "description": "d", "parameters": {}}]),
    },
    {"conversations": [
        {"from": "system", "value": "s"}, {"from": "user", "value": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
    ]},
]  # fmt: skip


class TestShareGpt:
    def test_rows(self) -> None:
        found = [parsed("sharegpt", row) for row in SHAREGPT]
        assert said(found[0]) == [("system", "s", 0.0), ("user", "a", 0.0), ("assistant", "b", 1.0)]
        assert [message.role for message in found[1].messages] == ["user", "assistant", "tool", "assistant"]
        assert found[1].messages[1].tool_calls == (
            {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}},
        )
        assert found[1].messages[3].train is True
        assert found[1].tools[0] == {
            "type": "function", "function": {"name": "add", "description": "d", "parameters": {}}
        }  # fmt: skip
        assert said(found[2]) == [("system", "s", 0.0), ("user", "a", 0.0), ("assistant", "b", 0.0)]
        assert found[0].group == "user:a"

    def test_several_calls_in_one_turn(self) -> None:
        calls = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": 1}}]
        row = {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": calls}]}
        assert len(parsed("sharegpt", row).messages[1].tool_calls) == 2

    def test_the_system_text_beside_the_turns_under_each_name(self) -> None:
        turns = SHAREGPT[0]["conversations"]
        for row in ({"system": "s"}, {"system_prompt": "s"}, {"system": "", "system_prompt": "s"}):
            assert parsed("sharegpt", {"conversations": turns, **row}) == parsed("sharegpt", SHAREGPT[0])
        assert said(parsed("sharegpt", {**SHAREGPT[2], "system": "s"})) == said(parsed("sharegpt", SHAREGPT[2]))

    @pytest.mark.parametrize("before", [[], [{"from": "system", "value": "s"}]])
    def test_a_greeting_is_kept_and_not_trained(self, before: list[dict[str, Any]]) -> None:
        greeting = {"from": "gpt", "value": "Welcome."}
        turns = SHAREGPT[0]["conversations"]
        found = parsed("sharegpt", {"conversations": [*before, greeting, *turns]})
        assert said(found)[-3:] == [("assistant", "Welcome.", 0.0), ("user", "a", 0.0), ("assistant", "b", 1.0)]
        assert found.group == "user:a"
        flagged = parsed("sharegpt", {"conversations": [*before, {**greeting, "weight": 0.5}, *turns]})
        assert flagged.messages[-3].loss_weight == 0.5

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({}, "no_messages"),
            ({"conversations": "a"}, "no_messages"),
            ({"conversation": []}, "misspelt_field"),
            ({"conversations": ["a"]}, "bad_message"),
            ({"conversations": [{"from": "robot", "value": "a"}]}, "unknown_role"),
            ({"conversations": [{"from": ["human"], "value": "a"}]}, "unknown_role"),
            ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "content_not_text"),
            ({"conversations": [{"from": "gpt", "value": "b"}]}, "roles_out_of_order"),
            ({"conversations": [{"from": "gpt", "value": "b"}, {"from": "human", "value": "a"}]},
             "no_assistant_turn"),
            ({"conversations": [{"from": "gpt", "value": "b"}, *SHAREGPT[1]["conversations"]],
              "tools": SHAREGPT[1]["tools"]}, "greeting_before_tools"),
            ({"conversations": [{"from": "gpt", "value": "b"}, {"from": "tool", "value": "4"}]},
             "roles_out_of_order"),
            ({"conversations": [CALL, {"from": "observation", "value": "4"}, {"from": "gpt", "value": "b"},
                                {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
             "roles_out_of_order"),
            ({**SHAREGPT[2], "system": "another"}, "ambiguous_system"),
            ({**SHAREGPT[0], "system_prompt": "another"}, "ambiguous_fields"),
            ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
             "empty_assistant_turn"),
            ({"conversations": [{"from": "human", "value": "a"}]}, "no_assistant_turn"),
            ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
             "bad_tool_calls"),
            ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]},
             "bad_tool_calls"),
            ({**SHAREGPT[0], "tools": "["}, "bad_tools"),
            ({**SHAREGPT[0], "system": 3}, "content_not_text"),
        ],
    )  # fmt: skip
    def test_refused(self, row: dict[str, Any], reason: str) -> None:
        with pytest.raises(RefusedRow) as caught:
            parsed("sharegpt", row)
        assert caught.value.reason == reason


ALPACA = [
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"instruction": "Greet me.", "input": "", "output": "Hello.", "system": "Be kind."},
    {"instruction": "And now?", "output": "Six.", "history": [["Two and two?", "Four."]], "group": 3},
]


class TestAlpaca:
    def test_rows(self) -> None:
        found = [parsed("alpaca", row) for row in ALPACA]
        assert said(found[0]) == [("user", "Add.\n2 and 2", 0.0), ("assistant", "4", 1.0)]
        assert said(found[1])[:2] == [("system", "Be kind.", 0.0), ("user", "Greet me.", 0.0)]
        assert said(found[2]) == [
            ("user", "Two and two?", 0.0),
            ("assistant", "Four.", 1.0),
            ("user", "And now?", 0.0),
            ("assistant", "Six.", 1.0),
        ]
        assert found[2].group == "group:3"

    def test_columns_under_other_names(self) -> None:
        row = {"question": "Add.", "context": "1 and 1", "response": "2"}
        found = parsed("alpaca", row, instruction="question", input="context", output="response")
        assert said(found) == [("user", "Add.\n1 and 1", 0.0), ("assistant", "2", 1.0)]

    def test_the_question_in_the_input_alone(self) -> None:
        for instruction in ("", None):
            found = parsed("alpaca", {"instruction": instruction, "input": "Two and two?", "output": "4"})
            assert said(found) == [("user", "Two and two?", 0.0), ("assistant", "4", 1.0)]

    def test_a_name_given_to_one_field_is_no_longer_another_s(self) -> None:
        found = parsed("alpaca", {"input": "Q", "output": "A"}, instruction="input")
        assert said(found) == [("user", "Q", 0.0), ("assistant", "A", 1.0)]
        swapped = parsed(
            "alpaca", {"input": "Q", "instruction": "I", "output": "A"}, instruction="input", input="instruction"
        )
        assert said(swapped)[0][1] == "Q\nI"

    def test_tools(self) -> None:
        assert parsed("alpaca", {**ALPACA[0], "tools": json.dumps([TOOL])}).tools == (TOLD,)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"instruction": "", "input": " "}, "empty_text"),
            ({"instruction": None, "input": None}, "content_not_text"),
            ({"instruction": 3}, "content_not_text"),
            ({"output": "  "}, "empty_assistant_turn"),
            ({"output": None}, "empty_assistant_turn"),
            ({"input": ["a"]}, "content_not_text"),
            ({"history": [["a"]]}, "bad_history"),
            ({"history": "a"}, "bad_history"),
            ({"history": [["a", ""]]}, "empty_text"),
            ({"input": None, "inputs": "x"}, "misspelt_field"),
            ({"input": "\ud83d"}, "not_unicode"),
        ],
    )
    def test_refused(self, change: dict[str, Any], reason: str) -> None:
        with pytest.raises(RefusedRow) as caught:
            parsed("alpaca", {**ALPACA[0], **change})
        assert caught.value.reason == reason


EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
COMPLETION = [
    {"prompt": "Two and two?", "completion": "Four."},
    {"prompt": EARLIER, "completion": [{"role": "assistant", "content": "d"}], "system": None},
    {"prompt": "Two and two?", "completion": "Four.", "system": "Be brief.", "tools": [TOOL]},
]


class TestPromptCompletion:
    def test_rows(self) -> None:
        found = [parsed("prompt_completion", row) for row in COMPLETION]
        assert said(found[0]) == [("user", "Two and two?", 0.0), ("assistant", "Four.", 1.0)]
        assert said(found[1]) == [
            ("user", "a", 0.0),
            ("assistant", "b", 0.0),
            ("user", "c", 0.0),
            ("assistant", "d", 1.0),
        ]
        assert (found[2].messages[0].role, found[2].tools) == ("system", (TOLD,))

    def test_an_earlier_answer_that_is_flagged_is_trained(self) -> None:
        flagged = [EARLIER[0], {**EARLIER[1], "train": True}, EARLIER[2]]
        found = parsed("prompt_completion", {"prompt": flagged, "completion": "d"})
        assert [message.loss_weight for message in found.messages] == [0.0, 1.0, 0.0, 1.0]

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"completion": "b"}, "no_messages"),
            ({"prompt": "a"}, "no_messages"),
            ({"prompt": "", "completion": "b"}, "empty_text"),
            ({"prompt": "a", "completion": ""}, "empty_assistant_turn"),
            ({"prompt": 3, "completion": "b"}, "no_messages"),
            ({"prompt": EARLIER[:2], "completion": "b"}, "roles_out_of_order"),
            ({"prompt": "a", "completion": EARLIER[:1]}, "no_assistant_turn"),
            ({"prompt": "a", "completion": [*EARLIER[:2]]}, "user_after_user"),
            (
                {"prompt": [{"role": "system", "content": "s"}, *EARLIER], "completion": "d", "system": "t"},
                "ambiguous_system",
            ),
            ({"prompt": "a", "completions": "b"}, "misspelt_field"),
        ],
    )
    def test_refused(self, row: dict[str, Any], reason: str) -> None:
        with pytest.raises(RefusedRow) as caught:
            parsed("prompt_completion", row)
        assert caught.value.reason == reason

    def test_gsm8k(self, real_data: Path) -> None:
        for line in (real_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:50]:
            row = json.loads(line)
            found = parsed("prompt_completion", row, prompt="question", completion="answer")
            assert said(found) == [("user", row["question"], 0.0), ("assistant", row["answer"], 1.0)]
