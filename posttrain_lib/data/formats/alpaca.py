"""Alpaca rows: ``instruction``, ``input``, ``output``, with ``system`` and ``history`` where there is some.

The question is the instruction and, on a line of its own, the input, as LLaMA-Factory joins them. ``history`` is a
list of earlier [question, answer] pairs; their answers are assistant turns like the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import check_order, group_of, is_list, only_text, read, turns_of
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation, Message

FIELDS = ("instruction", "input", "output", "system", "history")


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Conversation:
    """Validate a row.

    Raises:
        RefusedRow: no instruction, no output, or a field that is no text.
    """
    found = read(row, FIELDS, fields)
    names = {name: fields.get(name, name) for name in FIELDS}
    system = only_text(found["system"], names["system"], empty=True)
    asked = only_text(found["instruction"], names["instruction"])
    given = only_text(found["input"], names["input"], empty=True)
    answer = only_text(found["output"], names["output"], empty=True)
    messages = (
        *((Message("system", system),) if system.strip() else ()),
        *_history(found["history"], names["history"]),
        Message("user", f"{asked}\n{given}" if given.strip() else asked),
        *turns_of(answer, "assistant", names["output"]),
    )
    check_order(messages)
    return Conversation(source, row_id, messages, (), group_of(row, messages, group_field))


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
