"""``messages`` rows: a list of {role, content, ...}, with ``tools`` where the conversation has some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import check_order, group_of, messages_of, read, tools_of
from posttrain_lib.schema.examples import Conversation

FIELDS = ("messages", "tools")


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Conversation:
    """Validate a row.

    Raises:
        RefusedRow: anything that a template would render wrongly or a mask could not cover; the reason is a code.
    """
    found = read(row, FIELDS, fields)
    messages = messages_of(found["messages"], fields.get("messages", "messages"))
    check_order(messages)
    return Conversation(source, row_id, messages, tools_of(found["tools"]), group_of(row, messages, group_field))
