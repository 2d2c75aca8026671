"""Calls that an assistant turn has in its words: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

Hermes' function calling writes them so, in ShareGPT rows as in messages. A template prints calls and their answers in
the form of its own model, and servers give them to it apart from the words: so they are taken out of the words, as far
as they are whole and stand at the end of the turn, and their answers out of ``<tool_response>``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain_lib.data.formats.common import CALL_MARK, check_unicode, tool_calls_of
from posttrain_lib.schema.examples import Message

_CALL = (CALL_MARK, "</tool_call>")
_ANSWER = ("<tool_response>", "</tool_response>")


def with_calls_read(
    messages: Sequence[Message], tools: Sequence[Any], beside: Sequence[Message] = ()
) -> tuple[Message, ...]:
    """The messages with calls in place of the words that spell them, and a tool's turn for each of its answers.

    Only of a row with tools or with a turn of a tool: in another, such words may be about calls. What is no whole JSON
    object with a name stays as it is; where a tool answers it, the check of the order refuses it.

    Args:
        beside: the row's other messages, where these are not all.

    Raises:
        RefusedRow: a call spells half of a surrogate pair or is nested without end.
    """
    if not tools and not any(message.role == "tool" for message in (*messages, *beside)):
        return tuple(messages)
    read = [_read(message, index) for index, message in enumerate(messages)]
    if all(now is before for now, before in zip(read, messages, strict=True)):
        return tuple(messages)
    return tuple(part for message in read for part in _answers(message))


def _read(message: Message, index: int) -> Message:
    content = message.content or ""
    start = content.find(_CALL[0])
    if message.role != "assistant" or message.tool_calls or start < 0:
        return message
    calls = [_call(text) for text in _inside(content[start:], _CALL)]
    if not calls or None in calls:
        return message
    # A template puts its own white space between words and calls.
    return dataclasses.replace(message, content=content[:start].rstrip(), tool_calls=tool_calls_of(calls, index))


def _answers(message: Message) -> Iterator[Message]:
    answers = _inside(message.content or "", _ANSWER) if message.role == "tool" else []
    yield from (dataclasses.replace(message, content=answer) for answer in answers) if answers else (message,)


def _inside(text: str, marks: tuple[str, str]) -> list[str]:
    """What stands between the marks, where the text is nothing but marked parts; else nothing."""
    *parts, rest = (part.strip() for part in text.split(marks[1]))
    if rest or not all(part.startswith(marks[0]) for part in parts):
        return []
    return [part.removeprefix(marks[0]).strip() for part in parts]


def _call(text: str) -> dict[str, Any] | None:
    """The call, or None for what is no call."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None  # words, as far as anyone can tell
    check_unicode(value)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    return value if isinstance(value.get("arguments", {}), dict) else None
