"""Calls in the words of an assistant: read where they are whole and the row is about tools, else left as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.formats import get_format
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import render_conversation
from posttrain_lib.schema.examples import Conversation, Message, PreferencePair

ONE, OTHER = {"name": "f", "arguments": {"x": 1}}, {"arguments": {}, "name": "g"}


def marked(*calls: Any) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def parsed(*turns: tuple[str, str], tools: Any = None) -> Conversation:
    row = {"conversations": [{"from": who, "value": value} for who, value in turns], "tools": tools}
    found = get_format("sharegpt")(row, "source", "row:1", "group", {})
    assert isinstance(found, Conversation)
    return found


def called(message: Message) -> list[dict[str, Any]]:
    return [call["function"] for call in message.tool_calls]


def test_a_call_and_its_answer() -> None:
    answer = '<tool_response>\n{"r": 4}\n</tool_response>'
    found = parsed(("human", "q"), ("gpt", f"Let me look.\n{marked(ONE)}"), ("tool", answer), ("gpt", "Four."))
    assert [message.content for message in found.messages] == ["q", "Let me look.", '{"r": 4}', "Four."]
    assert called(found.messages[1]) == [ONE]


def test_several_calls_and_answers_in_one_turn() -> None:
    answers = "<tool_response>4</tool_response>\n<tool_response>5</tool_response>"
    found = parsed(("human", "q"), ("gpt", marked(ONE, OTHER) + "\n"), ("tool", answers), ("gpt", "Nine."))
    assert [(message.role, message.content) for message in found.messages[1:]] == [
        ("assistant", ""),
        ("tool", "4"),
        ("tool", "5"),
        ("assistant", "Nine."),
    ]
    assert called(found.messages[1]) == [ONE, OTHER]


def test_a_row_with_tools_may_end_with_the_call() -> None:
    assert called(parsed(("human", "q"), ("gpt", marked(ONE)), tools=[{"name": "f"}]).messages[1]) == [ONE]


@pytest.mark.parametrize(
    "words",
    [
        marked({"arguments": {}}),
        marked({"name": "f", "arguments": [1]}),
        marked([ONE]),
        "<tool_call>{'name': 'f'}</tool_call>",
        f"{marked(ONE)} is how to call it.",
        f"{marked(ONE)}\nand\n{marked(OTHER)}",
        "<tool_call>",
        f"<tool_call>{'[' * 100_000}</tool_call>",
    ],
)
def test_what_is_no_whole_call_stays_and_no_tool_can_answer_it(words: str) -> None:
    found = parsed(("human", "q"), ("gpt", words), tools=[{"name": "f"}])
    assert (found.messages[1].content, found.messages[1].tool_calls) == (words, ())
    with pytest.raises(RefusedRow, match=r"bad_tool_calls: message 1 is answered by a tool"):
        parsed(("human", "q"), ("gpt", words), ("tool", "4"), ("gpt", "Four."))


def test_words_about_calls_in_a_row_without_tools_stay() -> None:
    assert parsed(("human", "How do I write one?"), ("gpt", marked(ONE))).messages[1].content == marked(ONE)


def test_half_of_a_surrogate_pair_spelt_in_a_call() -> None:
    with pytest.raises(RefusedRow, match="not_unicode"):
        parsed(("human", "q"), ("gpt", marked({"name": "f", "arguments": {"x": "\ud83d"}})), ("tool", "4"))


ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "tool", "content": "4"}
CALLING, GOOD, BAD = ({"role": "assistant", "content": said} for said in (marked(ONE), "Four.", marked(OTHER)))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [ASKED, CALLING, ANSWERED, GOOD]}),
        ("prompt_completion", {"prompt": [ASKED, CALLING, ANSWERED], "completion": [GOOD]}),
        ("prompt_completion", {"prompt": [ASKED], "completion": [CALLING, ANSWERED, GOOD]}),
        ("prompts", {"prompt": [ASKED, CALLING, ANSWERED]}),
        ("preference", {"prompt": [ASKED, CALLING, ANSWERED], "chosen": [GOOD], "rejected": [BAD]}),
    ],
)
def test_every_format_of_messages(name: str, row: dict[str, Any]) -> None:
    found = get_format(name)(row, "source", "row:1", "group", {})
    if isinstance(found, PreferencePair):
        assert called(found.rejected[0]) == [OTHER]
        assert called(found.prompt[1]) == [ONE]
    else:
        assert called(getattr(found, "messages")[1]) == [ONE]  # noqa: B009


def test_the_template_prints_them_in_its_own_form(real_tokenizer: Callable[[str], ChatTokenizer]) -> None:
    found = parsed(("human", "q"), ("gpt", f"Look.\n{marked(ONE)}"), ("tool", "4"), ("gpt", "Four."))
    document = render_conversation(real_tokenizer("qwen2.5"), found, "each").documents[0]
    learned = [document.text[span.start : span.end] for span in document.spans]
    assert learned == [f"Look.\n{marked(ONE)}<|im_end|>", "Four.<|im_end|>"]
