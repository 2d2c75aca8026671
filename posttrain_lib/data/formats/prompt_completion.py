"""``prompt`` and ``completion``: texts (one user and one assistant turn) or lists of messages.

Only the completion is learned: assistant turns of the prompt are what was said before, unless one says otherwise by its
``train`` or ``weight``. This is TRL's prompt-completion form, in both of its kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import check_order, group_of, read, tools_of, turns_of, with_system
from posttrain_lib.data.formats.marked_calls import with_calls_read
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation, Message

FIELDS = ("prompt", "completion", "system", "tools")
NEEDED = ("prompt", "completion")


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Conversation:
    """Validate a row.

    Raises:
        RefusedRow: no prompt, no completion, or roles that do not follow each other.
    """
    found, names = read(row, FIELDS, fields)
    tools = tools_of(found["tools"], names["tools"])
    prompt = with_system(found["system"], names["system"], turns_of(found["prompt"], "user", names["prompt"]))
    completion = turns_of(found["completion"], "assistant", names["completion"])
    if completion[-1].role != "assistant":
        raise RefusedRow("no_assistant_turn", f"the completion ends with a turn of {completion[-1].role}")
    messages = with_calls_read((*map(_untrained, prompt), *completion), tools)
    check_order(with_calls_read(prompt, tools), answered=False)
    check_order(messages, tools)
    return Conversation(source, row_id, messages, tools, group_of(row, messages, group_field))


def _untrained(message: Message) -> Message:
    silent = message.train is None and message.weight is None
    return dataclasses.replace(message, train=False) if silent and message.role == "assistant" else message
