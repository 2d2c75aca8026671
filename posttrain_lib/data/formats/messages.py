"""``messages`` rows: a list of {role, content, ...}, with ``system`` and ``tools`` where the conversation has some.

``system`` beside the messages is the Anthropic API's form; ``functions``, ``function_call`` and the role ``function``
are OpenAI's older one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import (
    check_order,
    greeting_untrained,
    group_of,
    messages_of,
    read,
    tools_of,
    with_system,
)
from posttrain_lib.data.formats.marked_calls import with_calls_read
from posttrain_lib.schema.examples import Conversation

FIELDS = ("messages", "system", "tools")
NEEDED = ("messages",)


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Conversation:
    """Validate a row.

    Raises:
        RefusedRow: anything that a template would render wrongly or a mask could not cover; the reason is a code.
    """
    found, names = read(row, FIELDS, fields)
    tools = tools_of(found["tools"], names["tools"])
    talk = with_system(found["system"], names["system"], messages_of(found["messages"], names["messages"]))
    messages = greeting_untrained(with_calls_read(talk, tools))
    check_order(messages, tools)
    return Conversation(source, row_id, messages, tools, group_of(row, messages, group_field))
