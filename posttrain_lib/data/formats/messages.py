"""``messages`` rows: a list of {role, content, ...}, with ``tools`` where the conversation has some."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
#: the names under which the field's data sets keep reasoning
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_OWN_FIELDS = ("role", "content", *_REASONING_FIELDS, "tool_calls", "train", "weight")

#: fields of others that look like ours and are not
_OTHER_FIELDS = ("tool_call_id",)
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-6, 1e6

#: which role may follow which; None is the start
_FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def parse(row: Mapping[str, Any], source: str, row_id: str, group_field: str | None) -> Conversation:
    """Validate a row.

    Raises:
        RefusedRow: anything that a template would render wrongly or a mask could not cover; the reason is a code.
    """
    raw = row.get("messages")
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
        raise RefusedRow("no_messages", f"'messages' is {'missing or empty' if not raw else type(raw).__name__}")
    _check_unicode(row)
    _check_spelling(row, ("messages", "tools"), (), "the row")
    messages = tuple(_message(item, index) for index, item in enumerate(raw))
    _check_order(messages)
    if not any(message.role == "assistant" for message in messages):
        raise RefusedRow("no_assistant_turn", f"roles are {[message.role for message in messages]}")
    return Conversation(source, row_id, messages, _tools(row.get("tools")), _group(row, messages, group_field))


def _message(raw: Any, index: int) -> Message:
    if not isinstance(raw, Mapping):
        raise RefusedRow("bad_message", f"message {index} is a {type(raw).__name__}, expected an object")
    _check_spelling(raw, _OWN_FIELDS, _OTHER_FIELDS, f"message {index}")
    role = raw.get("role")
    if role not in ROLES:
        raise RefusedRow("unknown_role", f"message {index} has role {role!r}, expected one of {', '.join(ROLES)}")
    content = _joined(raw.get("content"))
    if content is not None and not isinstance(content, str):
        raise RefusedRow("content_not_text", f"message {index} has content of type {type(content).__name__}")
    calls = _tool_calls(raw.get("tool_calls"), index)
    reasoning = next((raw[name] for name in _REASONING_FIELDS if raw.get(name) is not None), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise RefusedRow("content_not_text", f"message {index} has reasoning of type {type(reasoning).__name__}")
    if role == "assistant" and not (content or "").strip() and not calls:
        raise RefusedRow("empty_assistant_turn", f"message {index} says nothing and calls no tool")
    if role != "assistant" and content is None:
        raise RefusedRow("content_not_text", f"message {index} ({role}) has no content")
    extra = {key: value for key, value in raw.items() if key not in _OWN_FIELDS and value is not None}
    return Message(role, content, reasoning or None, calls, *_weights(raw, index), extra)


def _joined(content: Any) -> Any:
    """Text parts as one text; anything else as it is, to be judged by the caller."""
    parts = content if isinstance(content, list) else []
    found = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    texts = [text for text in found if isinstance(text, str)]
    return "".join(texts) if texts and len(texts) == len(parts) else content


def _weights(raw: Mapping[str, Any], index: int) -> tuple[bool | None, float | None]:
    train, weight = raw.get("train"), raw.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RefusedRow("bad_weight", f"message {index} has train={train!r}, expected true or false")
    if weight is None:
        return train, None
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    # Weights are kept as float32: what it cannot hold would train nothing, or everything.
    if not number or not (weight == 0 or _LEAST_WEIGHT <= weight <= _MOST_WEIGHT):
        raise RefusedRow(
            "bad_weight",
            f"message {index} has weight={str(weight)[:40]}, expected 0 or {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}",
        )
    return train, float(weight)


def _check_spelling(raw: Mapping[str, Any], own: Sequence[str], others: Sequence[str], where: str) -> None:
    """A misspelt ``train`` would be ignored, and the message trained."""
    for key in raw:
        if key in own or key in others or raw[key] is None:
            continue
        near = difflib.get_close_matches(str(key), own, n=1, cutoff=0.8)
        if near:
            raise RefusedRow("misspelt_field", f"{where} has a field {key!r}; is {near[0]!r} meant?")


def _check_unicode(row: Mapping[str, Any]) -> None:
    """JSON can spell half of a character pair; no tokenizer can read it."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedRow(
            "not_unicode", f"the row holds half of a surrogate pair: {error.object[error.start]!r}"
        ) from error


def _tool_calls(raw: Any, index: int) -> tuple[dict[str, Any], ...]:
    if not raw:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, str) or not all(isinstance(call, Mapping) for call in raw):
        raise RefusedRow("bad_tool_calls", f"message {index} has tool_calls that are no list of objects")
    calls = []
    for call in raw:
        inner = call.get("function", call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RefusedRow("bad_tool_calls", f"message {index} calls a function without a name")
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise RefusedRow(
                    "bad_tool_calls", f"message {index} has arguments that are no JSON: {error}"
                ) from error
        function = {"name": inner["name"], "arguments": arguments if arguments is not None else {}}
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append({"type": "function", "function": function, **identity})
    return tuple(calls)


def _tools(raw: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else None
        except ValueError as error:
            raise RefusedRow("bad_tools", f"'tools' is no JSON: {error}") from error
    if not raw:
        return ()
    if not isinstance(raw, Sequence) or not all(isinstance(tool, Mapping) for tool in raw):
        raise RefusedRow("bad_tools", "'tools' is no list of objects")
    return tuple(dict(tool) for tool in raw)


def _check_order(messages: Sequence[Message]) -> None:
    before: Message | None = None
    for index, message in enumerate(messages):
        allowed = _FOLLOWS[None if before is None else before.role]
        if message.role not in allowed:
            after = "at the start" if before is None else f"after {before.role}"
            raise RefusedRow(
                "roles_out_of_order", f"message {index} is {message.role} {after}, expected {' or '.join(allowed)}"
            )
        if message.role == "tool" and before is not None and before.role == "assistant" and not before.tool_calls:
            raise RefusedRow("roles_out_of_order", f"message {index} is a tool's answer to a turn that called none")
        before = message


def _group(row: Mapping[str, Any], messages: Sequence[Message], field: str | None) -> str:
    if field is not None and row.get(field) is not None:
        return f"{field}:{row[field]}"
    return "user:" + next(message.content or "" for message in messages if message.role == "user")
