"""Common starts and ends; own words by substitution."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.turns import common_prefix, common_suffix, own_words, stand_in
from posttrain_lib.schema.examples import Message

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
