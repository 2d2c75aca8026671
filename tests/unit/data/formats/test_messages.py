"""A ``messages`` row: what is taken, and the reason for everything that is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain_lib.data.formats.common import group_is_named
from posttrain_lib.data.formats.messages import parse
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation

TOOL = {"type": "function", "function": {"name": "f"}}
#: as a request brings it to a template
TOLD = {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "1"}


def parsed(*messages: Any, **row: Any) -> Conversation:
    return parse({"messages": list(messages), **row}, "source", "row:1", "group", {})


def test_a_plain_row() -> None:
    found = parsed(USER, ANSWER)
    assert [(message.role, message.content, message.loss_weight) for message in found.messages] == [
        ("user", "a", 0.0),
        ("assistant", "b", 1.0),
    ]
    assert (found.source, found.row_id, found.group) == ("source", "row:1", "user:a")


def test_the_group_is_the_named_field_or_the_first_question() -> None:
    assert parsed(USER, ANSWER, group=7).group == "group:7"
    assert parsed({"role": "system", "content": "s"}, USER, ANSWER).group == "user:a"


def test_tool_calls_become_objects_and_extra_fields_stay() -> None:
    found = parsed(USER, CALLING, RESULT, ANSWER, tools=json.dumps([TOOL]))
    assert found.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found.messages[2].extra == {"tool_call_id": "1"}
    assert found.tools == (TOLD,)


def test_columns_that_a_table_fills_with_nothing_are_no_fields() -> None:
    empty = {"tool_calls": None, "reasoning_content": None, "train": None, "weight": None, "name": None}
    assert parsed({**USER, **empty}, {**ANSWER, **empty}, tools=None) == parsed(USER, ANSWER)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_every_name_of_the_field(name: str) -> None:
    message = parsed(USER, {**ANSWER, name: "because"}).messages[1]
    assert (message.reasoning_content, message.extra) == ("because", {})


@pytest.mark.parametrize(("field", "meant"), [("trian", "train"), ("wieght", "weight"), ("tool_call", "tool_calls")])
def test_a_misspelt_field_is_no_extra_field(field: str, meant: str) -> None:
    with pytest.raises(RefusedRow, match=f"misspelt_field.*{meant}"):
        parsed(USER, {**ANSWER, field: 0})
    with pytest.raises(RefusedRow, match=r"misspelt_field.*tools"):
        parsed(USER, ANSWER, tool=[])


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parsed({"role": "user", "content": parts}, ANSWER).messages[0].content == "ab"


@pytest.mark.parametrize(
    ("fields", "weight"),
    [({}, 1.0), ({"train": False}, 0.0), ({"train": True}, 1.0), ({"weight": 0.5}, 0.5), ({"weight": 0}, 0.0),
     ({"weight": 2.0, "train": False}, 0.0)],
)  # fmt: skip
def test_weights(fields: dict[str, Any], weight: float) -> None:
    assert parsed(USER, {**ANSWER, **fields}).messages[1].loss_weight == weight


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no_messages"),
        ("text", "no_messages"),
        (["text"], "bad_message"),
        ([{"role": "robot", "content": "a"}], "unknown_role"),
        ([{"content": "a"}], "unknown_role"),
        ([ANSWER], "roles_out_of_order"),
        ([USER, USER, ANSWER], "user_after_user"),
        ([USER, ANSWER, ANSWER], "assistant_after_assistant"),
        ([USER, CALLING, RESULT, USER, ANSWER], "user_after_tool"),
        ([USER, ANSWER, {"role": "system", "content": "s"}], "roles_out_of_order"),
        ([USER, ANSWER, RESULT], "roles_out_of_order"),
        ([USER], "no_assistant_turn"),
        ([USER, {"role": "assistant", "content": ""}], "empty_assistant_turn"),
        ([USER, {"role": "assistant", "content": " \n"}], "empty_assistant_turn"),
        ([USER, {"role": "assistant"}], "empty_assistant_turn"),
        ([{"role": "user", "content": 3}, ANSWER], "content_not_text"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "content_not_text"),
        ([{"role": "user"}, ANSWER], "content_not_text"),
        ([USER, {**ANSWER, "reasoning_content": 1}], "content_not_text"),
        ([USER, {**ANSWER, "train": "no"}], "bad_weight"),
        ([USER, {**ANSWER, "weight": -1}], "bad_weight"),
        ([USER, {**ANSWER, "weight": float("nan")}], "bad_weight"),
        ([USER, {**ANSWER, "weight": True}], "bad_weight"),
        ([USER, {**ANSWER, "weight": 1e39}], "bad_weight"),
        ([USER, {**ANSWER, "weight": 1e-50}], "bad_weight"),
        ([USER, {**ANSWER, "weight": 10**400}], "bad_weight"),
        ([{"role": "user", "content": "half \ud83d"}, ANSWER], "not_unicode"),
        ([USER, {**ANSWER, "train": 2}], "bad_weight"),
        ([USER, {**ANSWER, "loss": 0.5}], "bad_weight"),
        ([USER, {**ANSWER, "loss_mask": [0, 1]}], "bad_weight"),
        ([USER, {**ANSWER, "train": True, "loss": False}], "bad_weight"),
        ([USER, {**ANSWER, "weight": 1, "loss_weight": 0.5}], "bad_weight"),
        ([USER, {**ANSWER, "mask": True}], "unsupported_field"),
        ([USER, {**ANSWER, "train_detail": [{"begin_offset": 0}]}], "unsupported_field"),
        ([USER, {**ANSWER, "function_call": {"arguments": "{}"}}], "bad_tool_calls"),
        ([USER, {**CALLING, "function_call": {"name": "f"}}], "bad_tool_calls"),
        ([{**USER, "tool_calls": CALLING["tool_calls"]}, ANSWER], "bad_tool_calls"),
        ([USER, {**ANSWER, "tool_calls": "f()"}], "bad_tool_calls"),
        ([USER, {**ANSWER, "tool_calls": [{"function": {}}]}], "bad_tool_calls"),
        ([USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "bad_tool_calls"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(messages: Any, reason: str) -> None:
    with pytest.raises(RefusedRow) as caught:
        parse({"messages": messages}, "s", "1", None, {})
    assert caught.value.reason == reason
    assert caught.value.detail


@pytest.mark.parametrize("tools", ["{", {"type": "function"}, ["f"]])
def test_tools_that_are_no_list_of_objects(tools: Any) -> None:
    with pytest.raises(RefusedRow, match="bad_tools"):
        parsed(USER, ANSWER, tools=tools)


def test_a_field_beside_the_one_it_resembles_is_no_misspelling() -> None:
    assert parsed(USER, ANSWER, messages_id=3).messages == parsed(USER, ANSWER).messages


def test_rows_that_call_the_messages_otherwise() -> None:
    row = {"turns": [USER, ANSWER], "functions": [TOOL], "messages": "not these"}
    found = parse(row, "s", "1", None, {"messages": "turns", "tools": "functions"})
    assert found.messages == parsed(USER, ANSWER).messages
    assert found.tools == (TOLD,)
    with pytest.raises(RefusedRow, match=r"no_messages: 'talk' is missing"):
        parse(row, "s", "1", None, {"messages": "talk"})


def test_nesting_without_end_is_refused() -> None:
    deep: Any = "a"
    for _ in range(200):
        deep = [deep]
    with pytest.raises(RefusedRow, match="nested_too_deep"):
        parsed(USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": {"a": deep}}}]}, RESULT, ANSWER)


def test_tools_are_those_that_a_request_can_carry() -> None:
    """Servers lose a function's other fields, and templates print what is there: training must not print more."""
    own = {"name": "f", "parameters": {"type": "object"}, "required": ["a"], "strict": True}
    found = parsed(USER, ANSWER, tools=[{"type": "function", "function": own, "id": 3}, own])
    kept = {"name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}
    assert found.tools == ({"type": "function", "function": kept},) * 2
    with pytest.raises(RefusedRow, match="bad_tools"):
        parsed(USER, ANSWER, tools=[{"type": "function", "function": {"description": "no name"}}])


@pytest.mark.parametrize("name", ["training", "trainable", "loss", "loss_mask"])
def test_whether_a_message_is_learned_under_every_name_of_the_field(name: str) -> None:
    for value, train in ((False, False), (0, False), (True, True), (1, True)):
        message = parsed(USER, {**ANSWER, name: value}).messages[1]
        assert (message.train, message.loss_weight, message.extra) == (train, float(train), {})


@pytest.mark.parametrize("name", ["loss_weight", "loss_scale"])
def test_weights_under_every_name_of_the_field(name: str) -> None:
    assert parsed(USER, {**ANSWER, name: 0.5}).messages[1].loss_weight == 0.5


def test_the_system_text_of_a_request_in_anthropic_s_form() -> None:
    whole = parsed({"role": "system", "content": "Be terse."}, USER, ANSWER)
    assert parsed(USER, ANSWER, system="Be terse.") == whole
    assert parsed(USER, ANSWER, system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "terse."}]) == whole
    assert (
        parsed(*({"role": "system", "content": "Be terse. "}, USER, ANSWER), system="Be terse.").messages[1:]
        == (whole.messages[1:])
    )
    with pytest.raises(RefusedRow, match="ambiguous_system"):
        parsed({"role": "system", "content": "Be kind."}, USER, ANSWER, system="Be terse.")
    with pytest.raises(RefusedRow, match="content_not_text"):
        parsed(USER, ANSWER, system=3)


def test_openai_s_older_form_of_calls() -> None:
    old = {"role": "assistant", "content": "Let me look.", "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "f", "content": "4"}
    found = parsed(USER, old, result, {**ANSWER, "function_call": None}, functions=[{"name": "f"}])
    assert found.tools == (TOLD,)
    assert found.messages[1].content == "Let me look."
    assert found.messages[1].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},)
    assert (found.messages[1].extra, found.messages[2].role, found.messages[2].extra) == ({}, "tool", {"name": "f"})
    with pytest.raises(RefusedRow, match="ambiguous_fields"):
        parsed(USER, ANSWER, tools=[TOOL], functions=[{"name": "g"}])


@pytest.mark.parametrize("arguments", ["", " ", None, "null", "{}"])
def test_a_call_without_parameters(arguments: str | None) -> None:
    message = parsed(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})
    assert message.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {}}


def test_variables_of_the_template_for_one_row_are_no_extra() -> None:
    with pytest.raises(RefusedRow, match=r"unsupported_field.*chat_template_kwargs"):
        parsed(USER, ANSWER, chat_template_kwargs={"enable_thinking": False})
    assert parsed(USER, ANSWER, chat_template_kwargs={}) == parsed(USER, ANSWER)


def test_whether_a_group_is_named() -> None:
    row = {"messages": [USER, ANSWER], "user": "a", "group": "user:a"}
    for field, named in (("group", True), ("user", True), ("gruop", False), (None, False)):
        assert group_is_named(parse(row, "s", "1", field, {}).group) is named
    assert parse(row, "s", "1", "user", {}).group != parse(row, "s", "1", None, {}).group
    assert not group_is_named(None)
