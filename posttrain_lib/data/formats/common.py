"""What the row formats share: finding fields under their names, and reading messages, tools and groups."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain_lib.data.refusal import RefusedRow, kind_of
from posttrain_lib.data.words import strings
from posttrain_lib.schema.examples import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
#: what begins a call in the words of an assistant (marked_calls.py reads it)
CALL_MARK = "<tool_call>"
#: further names of a row's fields, looked for where the source's ``fields`` say nothing
ALSO = {"system": ("system_prompt",), "tools": ("functions",)}
#: TRL's variables of the template for one row: here they are the run's
_UNSUPPORTED_IN_ROW = ("chat_template_kwargs",)
#: the names under which the field's data sets keep reasoning
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
#: whether a message is learned: ours, axolotl's, ms-swift's, and others that can mean nothing else
_TRAIN_FIELDS = ("train", "training", "trainable", "loss", "loss_mask")
_WEIGHT_FIELDS = ("weight", "loss_weight", "loss_scale")
#: ``mask`` means learned to some and left out to others; the details are axolotl's, parts of a message
_UNSUPPORTED = ("mask", "masked", "train_detail", "training_detail")
_CALL_FIELDS = ("tool_calls", "function_call")
_OWN_FIELDS = ("role", "content", *_REASONING_FIELDS, *_CALL_FIELDS, *_TRAIN_FIELDS, *_WEIGHT_FIELDS)
#: fields of others that look like ours and are not
_OTHER_FIELDS = ("tool_call_id",)
#: Weights are kept as float32: what it cannot hold would train nothing, or everything.
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6

#: which role may follow which; None is the start. An assistant that begins greets; a template may refuse that.
_FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user", "assistant"),
    "system": ("user", "assistant"),
    "developer": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
#: (before, after) that data sets have and templates print without a word as something else: a reason of their own
_UNPRINTABLE = {
    ("user", "user"): "user_after_user",
    ("assistant", "assistant"): "assistant_after_assistant",
    ("tool", "user"): "user_after_tool",
}
#: begins the group of a row that names none; no named group begins so
_BY_QUESTION = "user:"


def read(
    row: Mapping[str, Any], own: Sequence[str], fields: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(values, names): the row's values under the format's names, None where it has none; and what it calls them.

    Args:
        own: the format's names.
        fields: format's name -> the row's name, where they differ. A name given to one field is no longer another's.

    Raises:
        RefusedRow: a field that looks like a misspelt one, that this project cannot honour, or that is there under two
            names; half of a surrogate pair, or nesting without end.
    """
    check_unicode(row)
    names = {name: _called(row, name, fields) for name in own if name in fields or name not in fields.values()}
    check_spelling(row, tuple(names.values()), (), "the row")
    for name in _UNSUPPORTED_IN_ROW:
        if row.get(name) and name not in names.values():
            raise RefusedRow("unsupported_field", f"the row has {name!r}; data.template_kwargs holds for all rows")
    return {name: row.get(names[name]) if name in names else None for name in own}, {name: name for name in own} | names


def _called(row: Mapping[str, Any], name: str, fields: Mapping[str, str]) -> str:
    """What the row calls it: what the source says, else the name or another known one under which it says something."""
    if name in fields:
        return fields[name]
    known = [called for called in (name, *ALSO.get(name, ())) if called not in fields.values() and row.get(called)]
    if any(row[called] != row[known[0]] for called in known[1:]):
        raise RefusedRow("ambiguous_fields", f"the row has {' and '.join(known)}, which differ")
    return known[0] if known else name


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
        raise RefusedRow(
            "content_not_text", f"{name!r} is {'missing' if value is None else kind_of(value)}, expected text"
        )
    if not empty and not value.strip():
        raise RefusedRow("empty_text", f"{name!r} is empty")
    return value


def is_list(value: Any) -> bool:
    """Whether it is a list of some sort, and not a text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def messages_of(raw: Any, name: str) -> tuple[Message, ...]:
    """Validated messages of a non-empty list; their order is checked by :func:`check_order`."""
    if not is_list(raw) or not raw:
        found = "missing or empty" if not raw else kind_of(raw)
        raise RefusedRow("no_messages", f"{name!r} is {found}, expected a list")
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
        raise RefusedRow("bad_message", f"message {index} is {kind_of(raw)}, expected an object")
    check_spelling(raw, _OWN_FIELDS, _OTHER_FIELDS, f"message {index}")
    if unsupported := [name for name in _UNSUPPORTED if raw.get(name) is not None]:
        raise RefusedRow(
            "unsupported_field", f"message {index} has {unsupported[0]!r}; 'train' and 'weight' say what is learned"
        )
    # OpenAI's older name for the turn that answers a function_call.
    role = "tool" if raw.get("role") == "function" else raw.get("role")
    if role not in ROLES:
        raise RefusedRow("unknown_role", f"message {index} has role {role!r}, expected one of {', '.join(ROLES)}")
    content = _joined(raw.get("content"))
    if content is not None and not isinstance(content, str):
        raise RefusedRow("content_not_text", f"message {index} has content that is {kind_of(content)}")
    calls = _calls(raw, index)
    if calls and role != "assistant":
        raise RefusedRow("bad_tool_calls", f"message {index} ({role}) calls a tool, which only an assistant can")
    reasoning = next((raw[name] for name in _REASONING_FIELDS if raw.get(name) is not None), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise RefusedRow("content_not_text", f"message {index} has reasoning that is {kind_of(reasoning)}")
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


def _calls(raw: Mapping[str, Any], index: int) -> tuple[dict[str, Any], ...]:
    """The message's calls, or its one call in OpenAI's older form."""
    given = [name for name in _CALL_FIELDS if raw.get(name)]
    if len(given) > 1:
        raise RefusedRow("bad_tool_calls", f"message {index} has {' and '.join(given)}")
    return tool_calls_of([raw["function_call"]] if given == ["function_call"] else raw.get("tool_calls"), index)


def _weights(raw: Mapping[str, Any], index: int) -> tuple[bool | None, float | None]:
    train, weight = _said_once(raw, _TRAIN_FIELDS, index), _said_once(raw, _WEIGHT_FIELDS, index)
    if train is not None and (not isinstance(train, bool | int | float) or train not in (0, 1)):
        raise RefusedRow("bad_weight", f"message {index} has train={str(train)[:40]!r}, expected true or false")
    train = None if train is None else bool(train)
    if weight is None:
        return train, None
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not (weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT):
        raise RefusedRow(
            "bad_weight",
            f"message {index} has weight={repr(weight)[:40]}, expected the number 0, or one from {LEAST_WEIGHT:g} to "
            f"{MOST_WEIGHT:g}",
        )
    return train, float(weight)


def _said_once(raw: Mapping[str, Any], names: Sequence[str], index: int) -> Any:
    """The value that the message has under one of the names, or under several alike."""
    given = [name for name in names if raw.get(name) is not None]
    if any(raw[name] != raw[given[0]] for name in given[1:]):
        raise RefusedRow("bad_weight", f"message {index} has {' and '.join(given)}, which differ")
    return raw[given[0]] if given else None


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
        if isinstance(arguments, str):  # empty: a call without parameters, as some servers write it
            problem = f"message {index} has arguments that are no JSON"
            arguments = from_json(arguments, "bad_tool_calls", problem) if arguments.strip() else {}
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


def with_system(raw: Any, name: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages behind the system text that the row has beside them, as field ``name``; as they are without one.

    Raises:
        RefusedRow: it is no text, or the messages begin with another.
    """
    said = only_text(_joined(raw), name, empty=True)
    if not said.strip():
        return tuple(messages)
    if messages and messages[0].role == "system":
        if (messages[0].content or "").strip() != said.strip():
            raise RefusedRow("ambiguous_system", f"{name!r} and the system turn of the messages differ")
        return tuple(messages)
    return (Message("system", said), *messages)


def tools_of(raw: Any, name: str = "tools") -> tuple[dict[str, Any], ...]:
    """The tools of a row, its field ``name``: a list of objects, or that as JSON."""
    if isinstance(raw, str):
        raw = from_json(raw, "bad_tools", f"{name!r} is no JSON") if raw.strip() else None
    if not raw:
        return ()
    if not is_list(raw) or not all(isinstance(tool, Mapping) for tool in raw):
        raise RefusedRow("bad_tools", f"{name!r} is no list of objects")
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


def greeting_untrained(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with ``train=False`` on an assistant turn before the first question, unless it says otherwise.

    Serving never asks for it: whoever opens the conversation puts it there.
    """
    start = next((index for index, message in enumerate(messages) if message.role not in ("system", "developer")), 0)
    first = messages[start]
    if first.role != "assistant" or first.train is not None or first.weight is not None:
        return tuple(messages)
    return (*messages[:start], dataclasses.replace(first, train=False), *messages[start + 1 :])


def check_order(messages: Sequence[Message], tools: Sequence[Any] = (), *, answered: bool = True) -> None:
    """Refuse roles in an order that no template means. ``answered``: an assistant turn must follow the first question;
    not ``answered``: the last must be one that an assistant answers.
    """
    for index, message in enumerate(messages):
        _check_follows(messages[index - 1] if index else None, message, index)
    roles = [message.role for message in messages]
    if "user" not in roles and "assistant" in roles:
        raise RefusedRow("roles_out_of_order", f"no user asks anything: roles are {roles}")
    if "tool" in roles and roles.index("tool") < roles.index("user"):
        raise RefusedRow("roles_out_of_order", f"a tool answers before a user asks: roles are {roles}")
    if tools and "assistant" in roles[: roles.index("user") if "user" in roles else 0]:
        # Llama 3's templates print them into the first message, whoever speaks it, under the user's name.
        raise RefusedRow("greeting_before_tools", "the row has tools, and an assistant's turn before the first user's")
    if answered and ("user" not in roles or "assistant" not in roles[roles.index("user") :]):
        raise RefusedRow("no_assistant_turn", f"roles are {roles}")
    if not answered and (not roles or roles[-1] not in ("user", "tool")):
        said = "is empty" if not roles else f"ends with a turn of {roles[-1]}"
        raise RefusedRow("roles_out_of_order", f"the prompt {said}, expected user or tool at its end")


def _check_follows(before: Message | None, message: Message, index: int) -> None:
    allowed = _FOLLOWS[None if before is None else before.role]
    if message.role not in allowed:
        after = "at the start" if before is None else f"after {before.role}"
        raise RefusedRow(
            _UNPRINTABLE.get((before.role, message.role), "roles_out_of_order") if before else "roles_out_of_order",
            f"message {index} is {message.role} {after}, expected {' or '.join(allowed)}",
        )
    if message.role == "tool" and before is not None and before.role == "assistant" and not before.tool_calls:
        if CALL_MARK in (before.content or ""):
            raise RefusedRow(
                "bad_tool_calls",
                f"message {index - 1} is answered by a tool, and does not end with {CALL_MARK}, the call as JSON "
                f"(name and arguments) and its closing mark",
            )
        raise RefusedRow("roles_out_of_order", f"message {index} is a tool's answer to a turn that called none")


def group_of(row: Mapping[str, Any], messages: Iterable[Message], field: str | None) -> str:
    """The key by which train and held-out are split: the named field, else the first question."""
    named = named_group(row, field)
    return named or _BY_QUESTION + next(message.content or "" for message in messages if message.role == "user")


def named_group(row: Mapping[str, Any], field: str | None) -> str | None:
    """The group that the row names, if it does: ``<field>:<value>``.

    A column of integers of which some are missing comes as floats: 7.0 names the group that 7 names, NaN none.
    """
    value = None if field is None else row.get(field)
    if value is None or value != value:
        return None
    named = f"{field}:{int(value) if isinstance(value, float) and value.is_integer() else value}"
    return f"={named}" if named.startswith(_BY_QUESTION) else named


def group_is_named(group: str | None) -> bool:
    """Whether a parsed row's ``group`` comes from the field that ``held_out.group_field`` names.

    Otherwise the row has no such field, and stands in the group of its first question (``user:...``) or, without
    messages, in one by its content (None). A group field that is called ``user`` is told apart by the sign before it.
    """
    return group is not None and not group.startswith(_BY_QUESTION)
