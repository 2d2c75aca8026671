"""Common starts and ends; own words by substitution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.turns import Renderings, common_prefix, common_suffix, locate, own_words, stand_in
from posttrain_lib.schema.examples import Conversation, Message

WORDS = st.text(alphabet="ab<", max_size=12)


@given(WORDS, WORDS)
def test_common_prefix_is_the_longest(first: str, second: str) -> None:
    length = common_prefix(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == len(first) == len(second)


@given(WORDS, WORDS)
def test_common_suffix_is_the_prefix_read_backwards(first: str, second: str) -> None:
    assert common_suffix(first, second) == common_prefix(first[::-1], second[::-1])


@given(before=WORDS, content=WORDS.filter(str.strip), after=WORDS)
def test_own_words_are_exactly_the_content_whatever_stands_around_it(before: str, content: str, after: str) -> None:
    message = Message("assistant", content)
    text = before + content + after
    begin, end, notes = own_words(text, before + (stand_in(message).content or "") + after, message, 1)
    assert text[begin:end] == content
    assert (begin, notes) == (len(before), ())


def test_a_stand_in_leaves_empty_parts_empty() -> None:
    replaced = stand_in(Message("assistant", "", tool_calls=({"function": {"name": "f", "arguments": {"a": 1}}},)))
    assert replaced.content == ""
    assert replaced.reasoning_content is None
    assert replaced.tool_calls[0]["function"]["name"] == "f"
    assert replaced.tool_calls[0]["function"]["arguments"] != {"a": 1}


# Prints the system text within the last message if a user says it, and another header before calls than serving does.
MOVES_AND_CALLS = (
    "{% set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join %}"
    "{% for m in messages if m.role != 'system' %}"
    "<|im_start|>{{ 'assistant_call' if m.tool_calls else m.role }}\n"
    "{% if m.role == 'user' and loop.last %}{{ system }}\n\n{% endif %}"
    "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = Message("assistant", "", tool_calls=({"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},))
BEFORE = (Message("system", "Be brief."), Message("user", "first"), Message("assistant", "one"))


def renderings(tokenizer: ChatTokenizer, *messages: Message) -> Renderings:
    return Renderings(tokenizer, Conversation("s", "1", messages))


def test_the_header_of_an_earlier_turn_aligns_nothing(with_template: Callable[..., ChatTokenizer]) -> None:
    """It has more characters than many a message; the turn would hold the user's words."""
    tokenizer = with_template(MOVES_AND_CALLS)
    with pytest.raises(RefusedRow, match="masks_disagree"):
        locate(renderings(tokenizer, *BEFORE, Message("user", "second"), CALL), 4)


def test_words_before_a_moved_text_align(with_template: Callable[..., ChatTokenizer]) -> None:
    tokenizer = with_template(MOVES_AND_CALLS)
    turn = locate(renderings(tokenizer, *BEFORE, Message("user", "second"), Message("assistant", "two")), 4)
    assert turn.text[turn.start :] == "two<|im_end|>"
    assert turn.text[: turn.start].endswith("Be brief.\n\nsecond<|im_end|>\n<|im_start|>assistant\n")
    assert "prompt_rewritten" in turn.notes


MOVES_BEHIND_TOOLS = MOVES_AND_CALLS.replace(
    "m.role == 'user' and loop.last", "loop.first and messages[-1].role == 'tool'"
)


def test_a_short_answer_of_a_tool_aligns_though_it_is_escaped(with_template: Callable[..., ChatTokenizer]) -> None:
    tokenizer = with_template(MOVES_BEHIND_TOOLS)
    talk = (
        Message("system", "Be brief."),
        Message("user", "a"),
        CALL,
        Message("tool", '"'),
        Message("assistant", "two"),
    )
    turn = locate(renderings(tokenizer, *talk), 4)
    assert turn.text[turn.start :] == "two<|im_end|>"
    assert "prompt_rewritten" in turn.notes
