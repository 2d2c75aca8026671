"""Words of a row that spell a control token: a text could then end its turn and speak for another.

Serving reads such words as control, so by default the row is refused. The other policy encodes them as text
(posttrain_lib/data/literal.py); here they are replaced before a template sees them.

Which tokens are control depends on who speaks. For users, systems, tools, names and arguments of calls it is every
marker of the tokenizer, whether or not it is flagged as special: Qwen3's ``<tool_call>`` is not. What an assistant says
is what the model writes, so there the markers are left out that it writes in an answer (``written_in_answers``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

from posttrain_lib.data.chat_tokenizer import any_of
from posttrain_lib.data.literal import literal
from posttrain_lib.data.probes import written_in_answers
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.words import strings, with_strings
from posttrain_lib.schema.examples import Conversation, Message

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

#: stands before and behind words that could complete a control token; one that turns.py does not use
_APART = "\ue002"


def without_control_tokens(
    tokenizer: ChatTokenizer, conversation: Conversation, policy: str
) -> tuple[Conversation, bool]:
    """The conversation as a template may render it, and whether words of it have stand-ins.

    Args:
        policy: the config's ``control_tokens``: refuse or as_text.

    Raises:
        RefusedRow: words spell a control token (``refuse``), or would together with what stands beside them.
    """
    found = _spelt(tokenizer, conversation)
    if found is not None and policy == "refuse":
        raise RefusedRow("control_token_in_text", found)
    if found is not None:
        control, answers = tokenizer.marker, _control_in_answers(tokenizer)
        hide = literal(tokenizer).hide
        conversation = _changed(conversation, lambda words: hide(words, control), lambda words: hide(words, answers))
    _check_seams(tokenizer, conversation)
    return conversation, found is not None


def spells_control_token(tokenizer: ChatTokenizer, text: str, policy: str) -> bool:
    """Whether plain text spells a control token.

    Raises:
        RefusedRow: it does, and the policy is refuse.
    """
    found = tokenizer.marker.search(text) if tokenizer.marker else None
    if found and policy == "refuse":
        raise RefusedRow("control_token_in_text", f"the text holds {found.group()!r}")
    return found is not None


def _spelt(tokenizer: ChatTokenizer, conversation: Conversation) -> str | None:
    """Where the words spell a control token, for a person; None if nowhere."""
    control, answers = tokenizer.marker, _control_in_answers(tokenizer)
    for where, words, by_model in chain(_said(conversation.messages), _described(conversation)):
        token = answers if by_model else control
        if token is not None and (found := token.search(words)):
            return f"{where} holds {found.group()!r}"
    return None


@cache
def _control_in_answers(tokenizer: ChatTokenizer) -> re.Pattern[str] | None:
    """Matches a marker that the model does not write in an answer of its own accord."""
    return any_of(set(tokenizer.markers) - written_in_answers(tokenizer))


def _said(messages: Sequence[Message]) -> Iterator[tuple[str, str, bool]]:
    """(where, words, whether the model writes them) of everything in the messages that a template may print."""
    for index, message in enumerate(messages):
        where, answer = f"message {index} ({message.role})", message.role == "assistant"
        for words in strings((message.content, message.reasoning_content)):
            yield where, words, answer
        for words in strings((message.tool_calls, message.extra)):
            yield where, words, False


def _described(conversation: Conversation) -> Iterator[tuple[str, str, bool]]:
    """(where, words, False) of the tools."""
    for words in strings(conversation.tools):
        yield "the list of tools", words, False


def _check_seams(tokenizer: ChatTokenizer, conversation: Conversation) -> None:
    """Refuse words that make a control token only together with what the template prints beside them.

    Only words that are, begin with or end with a part of a control token can. They are set apart by a character
    before and behind; the rendering must then hold as many control tokens as without.
    """
    token, parts = tokenizer.marker, _parts_of(tokenizer)
    # A schema has words such as "object", which stand inside of some control token and next to quotes in every row.
    risky = {words for _, words, _ in _said(conversation.messages) if parts.borders(words) or parts.inside(words)}
    risky |= {words for _, words, _ in _described(conversation) if parts.borders(words)}
    if token is None or not risky:
        return

    def apart(words: str) -> str:
        inner = words.strip()
        return words.replace(inner, f"{_APART}{inner}{_APART}") if words in risky else words

    changed = _changed(conversation, apart, apart)
    if changed == conversation:  # only keys by which templates look values up, as a call's "name"
        return
    # An answer is printed in full as the last of its conversation only, where a template shortens earlier ones.
    pairs = enumerate(zip(conversation.messages, changed.messages, strict=True), start=1)
    counts = {count for count, (message, other) in pairs if message != other and message.loss_weight > 0}
    for count in sorted(counts | {len(conversation.messages)}):
        made, expected = (
            len(token.findall(tokenizer.render(which.messages[:count], which.tools)))
            for which in (conversation, changed)
        )
        if made > expected:
            raise RefusedRow(
                "control_token_in_text", f"the row's words and the template beside them spell {made - expected}"
            )


class _Parts:
    """Starts, ends and insides of the markers."""

    def __init__(self, names: Sequence[str]) -> None:
        self._starts = frozenset(name[:n] for name in names for n in range(1, len(name)))
        self._ends = frozenset(name[n:] for name in names for n in range(1, len(name)))
        self._longest = max(map(len, names), default=0)
        self._all = "\0".join(names)

    def borders(self, words: str) -> bool:
        """Whether the words begin with the end of a marker, or end with the start of one."""
        words = words.strip()
        lengths = range(1, min(len(words) + 1, self._longest))
        return any(words[-n:] in self._starts or words[:n] in self._ends for n in lengths)

    def inside(self, words: str) -> bool:
        """Whether the words stand inside of a marker."""
        words = words.strip()
        return 0 < len(words) < self._longest and words in self._all


@cache
def _parts_of(tokenizer: ChatTokenizer) -> _Parts:
    return _Parts(sorted(tokenizer.markers))


def _changed(
    conversation: Conversation, change: Callable[[str], str], change_answer: Callable[[str], str]
) -> Conversation:
    """The conversation with other words; ``change_answer`` for what the model writes (see ``_said``)."""
    return dataclasses.replace(
        conversation,
        messages=tuple(
            _changed_message(message, change, change_answer if message.role == "assistant" else change)
            for message in conversation.messages
        ),
        tools=tuple(with_strings(conversation.tools, change)),
    )


def _changed_message(message: Message, change: Callable[[str], str], change_text: Callable[[str], str]) -> Message:
    return dataclasses.replace(
        message,
        content=with_strings(message.content, change_text),
        reasoning_content=with_strings(message.reasoning_content, change_text),
        # A call's "type" is ours: templates compare it.
        tool_calls=tuple({**with_strings(call, change), "type": call["type"]} for call in message.tool_calls),
        extra=with_strings(message.extra, change),
    )
