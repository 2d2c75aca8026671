"""Random conversations through every real template: refused with a reason, or masked and reproduced exactly."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import Document, render_conversation, trained_messages
from posttrain_lib.data.tokenize import Tokens, tokenize
from posttrain_lib.schema.examples import Conversation
from tests.unit.data.conversations import HALVES, LOOKED_FOR, conversations, words
from tests.unit.data.real_templates import EVERY_TEMPLATE

#: its markers take the white space behind them, which decoding cannot give back
TAKES_WHITE_SPACE = ("phi-3-mini",)


def same(tokenizer: ChatTokenizer, name: str, ids: np.ndarray, text: str) -> bool:
    """Whether the ids spell the text, as exactly as the tokenizer can: Qwen's composes accents."""
    spelt, expected = (
        unicodedata.normalize("NFC", found) for found in (tokenizer.decode(ids, skip_special_tokens=False), text)
    )
    if name in TAKES_WHITE_SPACE:
        spelt, expected = ("".join(found.split()) for found in (spelt, expected))
    return spelt == expected


def check_document(tokenizer: ChatTokenizer, name: str, document: Document, tokens: Tokens) -> None:
    assert same(tokenizer, name, tokens.ids, document.text)
    learned = np.flatnonzero(tokens.weights)
    inside = np.concatenate([np.arange(first, end) for first, end in tokens.answers])
    assert learned.tolist() == inside.tolist()
    assert {tokens.roles[role] for role in tokens.role_of[learned]} == {"assistant"}
    for (first, end), span in zip(tokens.answers, document.spans, strict=True):
        answer = document.text[span.start : span.end]
        found = tokenizer.decode(tokens.ids[first:end], skip_special_tokens=False)
        assert "".join(unicodedata.normalize("NFC", found).split()) == "".join(
            unicodedata.normalize("NFC", answer).split()
        )


def mark_of(kind: str, index: int) -> str:
    """Letters that stand nowhere else, which no template or normaliser changes."""
    return f"zq{kind}{index}qz"


def signed(conversation: Conversation) -> Conversation:
    """The conversation with a mark of its own in each message's content, reasoning and calls."""
    messages = []
    for index, message in enumerate(conversation.messages):
        calls = tuple(
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": {**call["function"]["arguments"], "signed": mark_of("c", index)},
                },
            }
            for call in message.tool_calls
        )
        reasoning = message.reasoning_content and message.reasoning_content + mark_of("r", index)
        content = (message.content or "") + mark_of("m", index)
        messages.append(dataclasses.replace(message, content=content, reasoning_content=reasoning, tool_calls=calls))
    return dataclasses.replace(conversation, messages=tuple(messages))


def check_marks(conversation: Conversation, trained: list[int], learned: str, last: int | None) -> set[int]:
    """No words but those of trained messages are learned, the last one's are; the messages whose words are."""
    found = {(kind, int(index)) for kind, index in re.findall(r"zq([mrc])(\d+)qz", learned)}
    assert {index for _, index in found} <= set(trained)
    assert last in trained
    assert ("c" if conversation.messages[last].tool_calls else "m", last) in found
    return {index for _, index in found}


@pytest.mark.parametrize("name", EVERY_TEMPLATE)
def test_a_random_conversation_is_refused_or_learned_exactly(
    name: str, real_tokenizer: Callable[[str], ChatTokenizer]
) -> None:
    tokenizer, seen = real_tokenizer(name), Counter[str]()

    def refuse(refusal: RefusedRow) -> NoReturn:
        # Not counted among the examples: some templates refuse most conversations, which leaves few to learn from.
        seen[refusal.reason] += 1
        reject()

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        conversations(words(*HALVES, *LOOKED_FOR)),
        st.sampled_from(["each", "last", "as_rendered"]),
        st.sampled_from(["all", "last", "without_tools", "flagged"]),
    )
    def check(conversation: Conversation, trained_turns: str, train_on: str) -> None:
        conversation, said = signed(conversation), set[int]()
        try:
            rendered = render_conversation(tokenizer, conversation, trained_turns, train_on)
        except RefusedRow as refusal:
            refuse(refusal)
        for document in rendered.documents:
            try:
                tokens = tokenize(tokenizer, document)
            except RefusedRow as refusal:
                refuse(refusal)
            seen["learned"] += 1
            check_document(tokenizer, name, document, tokens)
            learned = tokenizer.decode(tokens.ids[tokens.weights > 0], skip_special_tokens=False)
            said |= check_marks(conversation, trained_messages(conversation, train_on), learned, document.last_turn)
        expected = trained_messages(conversation, train_on)
        if trained_turns == "last" and rendered.notes["rewritten_conversations"]:
            expected = expected[-1:]
        assert said == set(expected)

    check()
    assert seen["learned"] > 3, f"nearly every example was refused: {seen}"
