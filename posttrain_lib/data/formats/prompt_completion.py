"""``prompt`` and ``completion``: texts (one user and one assistant turn) or lists of messages.

Only the completion is learned: assistant turns of the prompt are what was said before, unless one says otherwise by its
``train`` or ``weight``. This is TRL's prompt-completion form, in both of its kinds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import check_order, group_of, only_text, read, tools_of, turns_of
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation, Message

FIELDS = ("prompt", "completion", "system", "tools")


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Conversation:
    """Validate a row.

    Raises:
        RefusedRow: no prompt, no completion, or roles that do not follow each other.
    """
    found = read(row, FIELDS, fields)
    system = only_text(found["system"], fields.get("system", "system"), empty=True)
    prompt = (
        *((Message("system", system),) if system.strip() else ()),
        *turns_of(found["prompt"], "user", fields.get("prompt", "prompt")),
    )
    check_order(prompt, answered=False)
    completion = turns_of(found["completion"], "assistant", fields.get("completion", "completion"))
    if completion[-1].role != "assistant":
        raise RefusedRow("no_assistant_turn", f"the completion ends with a turn of {completion[-1].role}")
    messages = (*map(_untrained, prompt), *completion)
    check_order(messages)
    return Conversation(source, row_id, messages, tools_of(found["tools"]), group_of(row, messages, group_field))


def _untrained(message: Message) -> Message:
    silent = message.train is None and message.weight is None
    return dataclasses.replace(message, train=False) if silent and message.role == "assistant" else message
