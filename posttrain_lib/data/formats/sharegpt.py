"""ShareGPT rows: ``conversations`` of {from, value}, in the variants that data sets use.

A call is a turn ``from: function_call`` whose value is the call as JSON ({name, arguments}, or a list of them), and
``from: observation`` answers it (LLaMA-Factory's form); or it is written in the words of the assistant (Hermes' form,
see marked_calls.py). Some sets write {role, content} under the same roles.

Where the system text already describes the tools, ``fields: {tools: none}`` keeps the template from doing so again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_lib.data.formats.common import (
    check_order,
    from_json,
    greeting_untrained,
    group_of,
    is_list,
    message_of,
    read,
    tools_of,
    with_system,
)
from posttrain_lib.data.formats.marked_calls import with_calls_read
from posttrain_lib.data.refusal import RefusedRow, kind_of
from posttrain_lib.schema.examples import Conversation, Message

FIELDS = ("conversations", "system", "tools")
NEEDED = ("conversations",)

_CALLS = "function_call"
#: who speaks, in the words of the data sets -> the role
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    _CALLS: "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}


def parse(
    row: Mapping[str, Any], source: str, row_id: str, group_field: str | None, fields: Mapping[str, str]
) -> Conversation:
    """Validate a row.

    Raises:
        RefusedRow: as for ``messages`` rows.
    """
    found, names = read(row, FIELDS, fields)
    turns, name = found["conversations"], names["conversations"]
    if not is_list(turns) or not turns:
        given = "missing or empty" if not turns else kind_of(turns)
        raise RefusedRow("no_messages", f"{name!r} is {given}, expected a list")
    tools = tools_of(found["tools"], names["tools"])
    talk = tuple(_message(turn, index) for index, turn in enumerate(turns))
    messages = greeting_untrained(with_calls_read(with_system(found["system"], names["system"], talk), tools))
    check_order(messages, tools)
    return Conversation(source, row_id, messages, tools, group_of(row, messages, group_field))


def _message(turn: Any, index: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RefusedRow("bad_message", f"message {index} is {kind_of(turn)}, expected an object")
    who, said = ("from", "value") if turn.get("from") is not None else ("role", "content")
    if not isinstance(turn.get(who), str) or turn[who] not in _ROLES:
        raise RefusedRow(
            "unknown_role", f"message {index} is from {turn.get(who)!r}, expected one of {', '.join(_ROLES)}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    if turn[who] != _CALLS:
        return message_of({**rest, "role": _ROLES[turn[who]], "content": turn.get(said)}, index)
    calls = turn.get(said)
    if isinstance(calls, str):
        calls = from_json(calls, "bad_tool_calls", f"message {index} is a call that is no JSON")
    return message_of(
        {**rest, "role": "assistant", "tool_calls": [calls] if isinstance(calls, Mapping) else calls}, index
    )
