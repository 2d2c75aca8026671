"""What the row formats share: finding fields under their names, and reading messages, tools and groups."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.words import strings
from posttrain_lib.schema.examples import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
#: the names under which the field's data sets keep reasoning
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_OWN_FIELDS = ("role", "content", *_REASONING_FIELDS, "tool_calls", "train", "weight")
#: fields of others that look like ours and are not
_OTHER_FIELDS = ("tool_call_id",)
#: Weights are kept as float32: what it cannot hold would train nothing, or everything.
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6

#: which role may follow which; None is the start
_FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def read(row: Mapping[str, Any], own: Sequence[str], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row's values under the format's names; None where the row has none.

    Args:
        own: the format's names.
        fields: format's name -> the row's name, where they differ.

    Raises:
        RefusedRow: a field that looks like a misspelt one, half of a surrogate pair, or nesting without end.
    """
    check_unicode(row)
    names = {name: fields.get(name, name) for name in own}
    check_spelling(row, tuple(names.values()), (), "the row")
    return {name: row.get(called) for name, called in names.items()}


def check_spelling(raw: Mapping[str, Any], own: Sequence[str], others: Sequence[str], where: str) -> None:
    """A misspelt ``train`` would be ignored, and the message trained.

    A name is taken for a misspelling only of a field that is not there: ``prompt_id`` beside ``prompt`` is a field
    of its own.
    """
    missing = [name for name in own if raw.get(name) is None]
    for key in raw:
        if key in own or key in others or raw[key] is None:
            continue
        near = difflib.get_close_matches(str(key), missing, n=1, cutoff=0.8)
        if near:
            raise RefusedRow("misspelt_field", f"{where} has a field {key!r}; is {near[0]!r} meant?")


def check_unicode(value: Any) -> None:
    """JSON can spell half of a character pair; no tokenizer can read it."""
    for text in strings(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RefusedRow(
                "not_unicode", f"the row holds half of a surrogate pair: {error.object[error.start]!r}"
            ) from error


def only_text(value: Any, name: str, *, empty: bool = False) -> str:
    """The value, which must be a string that says something (or may be empty or missing, with ``empty``)."""
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise RefusedRow("content_not_text", f"{name!r} is {_kind(value)}, expected text")
    if not empty and not value.strip():
        raise RefusedRow("empty_text", f"{name!r} is empty")
    return value


def is_list(value: Any) -> bool:
    """Whether it is a list of some sort, and not a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def messages_of(raw: Any, name: str) -> tuple[Message, ...]:
    """Validated messages of a non-empty list; their order is checked by :func:`check_order`."""
    if not is_list(raw) or not raw:
        raise RefusedRow("no_messages", f"{name!r} is {'missing or empty' if not raw else _kind(raw)}")
    return tuple(message_of(item, index) for index, item in enumerate(raw))


def turns_of(raw: Any, role: str, name: str) -> tuple[Message, ...]:
    """A text as one message of this role, or a list of messages as they are."""
    if not isinstance(raw, str):
        return messages_of(raw, name)
    if not raw.strip():
        raise RefusedRow("empty_assistant_turn" if role == "assistant" else "empty_text", f"{name!r} is empty")
    return (Message(role, raw),)


def message_of(raw: Any, index: int) -> Message:
    """One validated message."""
    if not isinstance(raw, Mapping):
        raise RefusedRow("bad_message", f"message {index} is a {type(raw).__name__}, expected an object")
    check_spelling(raw, _OWN_FIELDS, _OTHER_FIELDS, f"message {index}")
    role = raw.get("role")
    if role not in ROLES:
        raise RefusedRow("unknown_role", f"message {index} has role {role!r}, expected one of {', '.join(ROLES)}")
    content = _joined(raw.get("content"))
    if content is not None and not isinstance(content, str):
        raise RefusedRow("content_not_text", f"message {index} has content of type {type(content).__name__}")
    calls = tool_calls_of(raw.get("tool_calls"), index)
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
    if not number or not (weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT):
        raise RefusedRow(
            "bad_weight",
            f"message {index} has weight={str(weight)[:40]}, expected 0 or {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}",
        )
    return train, float(weight)


def tool_calls_of(raw: Any, index: int) -> tuple[dict[str, Any], ...]:
    """The calls of message ``index`` in OpenAI's form, arguments as objects."""
    if not raw:
        return ()
    if not is_list(raw) or not all(isinstance(call, Mapping) for call in raw):
        raise RefusedRow("bad_tool_calls", f"message {index} has tool_calls that are no list of objects")
    calls = []
    for call in raw:
        inner = call.get("function", call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RefusedRow("bad_tool_calls", f"message {index} calls a function without a name")
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            arguments = from_json(arguments, "bad_tool_calls", f"message {index} has arguments that are no JSON")
        function = {"name": inner["name"], "arguments": arguments if arguments is not None else {}}
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append({"type": "function", "function": function, **identity})
    return tuple(calls)


def from_json(text: str, reason: str, problem: str) -> Any:
    """A value that a row holds as JSON, checked like the rest of the row."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedRow(reason, f"{problem}: {error}") from error
    check_unicode(value)
    return value


def tools_of(raw: Any) -> tuple[dict[str, Any], ...]:
    """The tools of a row: a list of objects, or that as JSON."""
    if isinstance(raw, str):
        raw = from_json(raw, "bad_tools", "'tools' is no JSON") if raw.strip() else None
    if not raw:
        return ()
    if not is_list(raw) or not all(isinstance(tool, Mapping) for tool in raw):
        raise RefusedRow("bad_tools", "'tools' is no list of objects")
    return tuple(_as_requested(tool) for tool in raw)


def _as_requested(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as an OpenAI request brings it to a template: fields of others are lost on the way, absent ones are null.

    vLLM's FunctionDefinition does so; a template prints what it gets, so training has to print the same.
    """
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RefusedRow("bad_tools", "a tool is no function with a name")
    kept = {name: function.get(name) for name in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        kept["strict"] = function["strict"]
    return {"type": "function", "function": kept}


def check_order(messages: Sequence[Message], *, answered: bool = True) -> None:
    """Refuse roles in an order that no template means. ``answered``: an assistant turn must be among them;
    not ``answered``: the last must be one that an assistant answers.
    """
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
    if answered and not any(message.role == "assistant" for message in messages):
        raise RefusedRow("no_assistant_turn", f"roles are {[message.role for message in messages]}")
    if not answered and (before is None or before.role not in ("user", "tool")):
        said = "empty" if before is None else f"ends with a turn of {before.role}"
        raise RefusedRow("roles_out_of_order", f"the prompt is {said}, expected user or tool at its end")


def group_of(row: Mapping[str, Any], messages: Iterable[Message], field: str | None) -> str:
    """The key by which train and held-out are split: the named field, else the first question."""
    named = named_group(row, field)
    return named or "user:" + next(message.content or "" for message in messages if message.role == "user")


def named_group(row: Mapping[str, Any], field: str | None) -> str | None:
    """The group that the row names, if it does."""
    return f"{field}:{row[field]}" if field is not None and row.get(field) is not None else None


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
