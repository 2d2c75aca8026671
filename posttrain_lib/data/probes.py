"""What a template does, found out on conversations of a few words: how it ends an answer, what it leaves out."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.turns import Renderings, locate
from posttrain_lib.errors import DataError
from posttrain_lib.schema.examples import Conversation, Message

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

_MARK = "marked"
_ASKED = Message("user", "Hello")
_PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer", "description": "a number"}}}
_TOOL = {"type": "function", "function": {"name": _MARK, "description": "a tool", "parameters": _PARAMETERS}}
# Nine characters, because Mistral's templates demand that of a call's id.
_CALLED = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"a": _MARK}}}
_CALL = Message("assistant", "", tool_calls=(_CALLED,))
_REASONED = Conversation("probe", "reasoned", (_ASKED, Message("assistant", _MARK, _MARK)))
_PLAIN = Conversation("probe", "plain", (_ASKED, Message("assistant", _MARK)))
_CALLING = Conversation("probe", "calling", (_ASKED, _CALL))
_ANSWER = Message("tool", _MARK, extra={"tool_call_id": "abcdefghi", "name": "f"})
_ANSWERED = (
    _ASKED,
    Message("assistant", "", tool_calls=({**_CALLED, "function": {"name": "f", "arguments": {}}},)),
    _ANSWER,
)


def check_maskable(tokenizer: ChatTokenizer, where: object) -> None:
    """Refuse a template that cannot be masked before a single row is read.

    Raises:
        DataError: the template renders no plain exchange, knows no generation prompt though it has a header, or the
            two ways of finding the answer do not agree.
    """
    renderings = Renderings(tokenizer, _PLAIN)
    try:
        turn = locate(renderings, 1)
        header = turn.text[turn.start : turn.own_start].strip()
        asks = renderings.upto(1) != next(renderings.prompts(1))
        problem = f"it prints {header!r} before an answer and ignores add_generation_prompt" if header else ""
    except RefusedRow as refusal:
        problem, asks = refusal.detail, False
    if problem and not asks:
        raise DataError(
            "the chat template cannot be masked: the assistant's turn is not found in a plain exchange",
            where=where,
            got=problem,
            expected="a template that renders user and assistant turns and knows add_generation_prompt",
            fix="name another template in data.chat_template; variables that it misses go into data.template_kwargs",
        )


@cache
def stop_ids(tokenizer: ChatTokenizer) -> frozenset[int]:
    """Ids that end a generation: the end of sequence, and the markers that close answers and calls."""
    found = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    for closed in (_PLAIN, _CALLING):
        try:
            ending = [token for token in tokenizer.encode(_ending(tokenizer, closed)).ids.tolist()]
        except RefusedRow:
            continue  # a template without tools; one without plain answers was refused before
        markers = [token for token in ending if token in tokenizer.special_ids]
        found.update(markers[-1:])
    return frozenset(found)


@cache
def written_in_answers(tokenizer: ChatTokenizer) -> frozenset[str]:
    """Markers that are no special tokens and that a model writes in its answers, so that an assistant's text may too.

    Those of reasoning, which rows of every origin hold in the content, and what this template prints in an answer with
    reasoning or calls.
    """
    written = {"<think>", "</think>"}
    for answered in (_PLAIN, _REASONED, _CALLING):
        try:
            turn = locate(Renderings(tokenizer, answered), 1)
        except RefusedRow:
            continue  # a template without tools
        written.update(tokenizer.marker.findall(turn.text, turn.start) if tokenizer.marker else ())
    return frozenset(name for name, special in tokenizer.markers.items() if not special and name in written)


def left_out(tokenizer: ChatTokenizer, conversation: Conversation) -> str | None:
    """What of the conversation this template would leave out without a word; None if nothing.

    A template that raises is not silent: it refuses the row itself.
    """
    roles = {message.role for message in conversation.messages}
    present = {
        "tools": bool(conversation.tools),
        "tool calls": any(message.tool_calls for message in conversation.messages),
        "tool turns": "tool" in roles,
        "system turn": "system" in roles,
        "developer turn": "developer" in roles,
    }
    return next((part for part in _ignored(tokenizer) if present[part]), None)


@cache
def _ignored(tokenizer: ChatTokenizer) -> tuple[str, ...]:
    probes = {
        "tools": Conversation("probe", "tools", (_ASKED,), tools=(_TOOL,)),
        "tool calls": _CALLING,
        "tool turns": Conversation("probe", "tool turns", _ANSWERED),
        "system turn": Conversation("probe", "system turn", (Message("system", _MARK), _ASKED)),
        "developer turn": Conversation("probe", "developer turn", (Message("developer", _MARK), _ASKED)),
    }
    return tuple(part for part, probe in probes.items() if not _shows_mark(tokenizer, probe))


def _shows_mark(tokenizer: ChatTokenizer, probe: Conversation) -> bool:
    try:
        return _MARK in tokenizer.render(probe.messages, probe.tools, answer_next=True).casefold()
    except RefusedRow:
        return True  # it says so itself, row by row


def _ending(tokenizer: ChatTokenizer, probe: Conversation) -> str:
    """What the template prints behind the last own word of the probe's answer."""
    renderings = Renderings(tokenizer, probe)
    turn = locate(renderings, 1)
    return turn.text[turn.own_end :]
