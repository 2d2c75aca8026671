"""Alpaca rows: ``instruction``, ``input``, ``output``, with ``system``, ``history`` and ``tools`` where there is some.

The question is the instruction and, on a line of its own, the input, as LLaMA-Factory joins them; one of them may be
all of it. ``history`` is a list of earlier [question, answer] pairs; their answers are assistant turns like the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import (
    check_order,
    group_of,
    is_list,
    only_text,
    read,
    tools_of,
    turns_of,
    with_system,
)
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation, Message

FIELDS = ("instruction", "input", "output", "system", "history", "tools")
NEEDED = ("output",)


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Conversation:
    """Validate a row.

    Raises:
        RefusedRow: neither instruction nor input, no output, or a field that is no text.
    """
    found, names = read(row, FIELDS, fields)
    given = only_text(found["input"], names["input"], empty=True)
    asked = only_text(found["instruction"], names["instruction"], empty=bool(given.strip()))
    answer = only_text(found["output"], names["output"], empty=True)
    talk = (
        *_history(found["history"], names["history"]),
        Message("user", "\n".join(part for part in (asked, given) if part.strip())),
        *turns_of(answer, "assistant", names["output"]),
    )
    messages = with_system(found["system"], names["system"], talk)
    tools = tools_of(found["tools"], names["tools"])
    check_order(messages, tools)
    return Conversation(source, row_id, messages, tools, group_of(row, messages, group_field))


def _history(raw: Any, name: str) -> list[Message]:
    if not raw:
        return []
    if not is_list(raw) or not all(is_list(pair) and len(pair) == 2 for pair in raw):
        raise RefusedRow("bad_history", f"{name!r} is no list of [question, answer] pairs")
    return [
        message
        for asked, answered in raw
        for message in (Message("user", only_text(asked, name)), Message("assistant", only_text(answered, name)))
    ]
