"""From a conversation to documents of text with weighted spans: one, or one a turn where the template rewrites.

Some templates print an earlier turn otherwise than when it was the last: Qwen3 drops its reasoning, gpt-oss ends it
with another marker. Such a turn can only be learned as serving had it, in a document that ends with it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from posttrain_lib.data.control_tokens import without_control_tokens
from posttrain_lib.data.probes import left_out
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.turns import (
    Renderings,
    Turn,
    closing,
    common_prefix,
    locate,
    own_words,
)
from posttrain_lib.schema.examples import Conversation

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` of a document, learned with this weight.

    ``closed``: ends with a marker. ``turn``: index of its message, None where it is of none.
    """

    start: int
    end: int
    weight: float
    closed: bool = True
    turn: int | None = None


@dataclass(frozen=True)
class Document:
    """Text to learn from. ``parts`` are (end, role) of the messages in it, headers counted to their message.

    ``suffix`` tells several documents of one row apart; ``last_turn`` is the index of the last trained message (None:
    nothing is trained). ``literal``: words that spell control tokens have stand-ins in it (see
    posttrain_lib/data/literal.py). ``as_history``: only the last of its turns stands as serving has it; the others are
    learned as that turn's prompt holds them.
    """

    text: str
    spans: tuple[Span, ...]
    parts: tuple[tuple[int, str], ...]
    last_turn: int | None
    suffix: str = ""
    literal: bool = False
    as_history: bool = False

    def turn_by_turn(self) -> tuple[Document, ...]:
        """A document for each of its spans, which ends with it and trains nothing else."""
        return tuple(self._up_to(span) for span in self.spans)

    def _up_to(self, span: Span) -> Document:
        whole = [part for part in self.parts if part[0] < span.end]
        role = self.parts[min(len(whole), len(self.parts) - 1)][1]
        return dataclasses.replace(
            self,
            text=self.text[: span.end],
            spans=(span,),
            parts=(*whole, (span.end, role)),
            last_turn=span.turn,
            suffix=f"{self.suffix}#turn{span.turn}",
        )


@dataclass(frozen=True)
class Rendered:
    """The documents of a conversation. ``notes`` count what the receipt should mention."""

    documents: tuple[Document, ...]
    notes: Counter[str] = field(default_factory=Counter)


def render_conversation(
    tokenizer: ChatTokenizer,
    conversation: Conversation,
    trained_turns: str,
    train_on: str = "all",
    control_tokens: str = "refuse",
) -> Rendered:
    """Render and mask.

    Args:
        trained_turns: the config's field, for templates that rewrite earlier turns: each, last or as_rendered.
        train_on: the config's field, which turns of a weight above 0 are trained: all, last, without_tools or flagged.
        control_tokens: the config's field, for words that spell a control token: refuse or as_text.

    Raises:
        RefusedRow: nothing in it is trained, the template cannot render it, or its mask is in doubt.
    """
    trained = trained_messages(conversation, train_on)
    check_shown(tokenizer, conversation)
    conversation, literal = without_control_tokens(tokenizer, conversation, control_tokens)
    renderings = Renderings(tokenizer, conversation)
    turns = [locate(renderings, index) for index in trained]
    notes = Counter(note for turn in turns for note in turn.notes)
    notes["control_tokens_as_text"] += literal
    documents = _documents(renderings, turns, trained_turns, notes)
    return Rendered(tuple(dataclasses.replace(document, literal=literal) for document in documents), +notes)


def render_prompt(tokenizer: ChatTokenizer, conversation: Conversation, control_tokens: str = "refuse") -> Rendered:
    """What serving sends for an answer to the conversation, as one document that trains nothing.

    Raises:
        RefusedRow: the template cannot render it, or words of it spell control tokens.
    """
    check_shown(tokenizer, conversation)
    conversation, literal = without_control_tokens(tokenizer, conversation, control_tokens)
    renderings = Renderings(tokenizer, conversation)
    text = next(renderings.prompts(len(conversation.messages)))
    parts = _parts(renderings, text, len(conversation.messages) - 1)
    document = Document(text, (), parts, None, literal=literal)
    return Rendered((document,), +Counter(control_tokens_as_text=int(literal)))


def trained_messages(conversation: Conversation, train_on: str) -> list[int]:
    """Indices of the messages that are trained.

    Raises:
        RefusedRow: there is none.
    """
    messages = conversation.messages
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=-1)
    chosen: dict[str, Callable[[int], bool]] = {
        "all": lambda index: True,
        "last": lambda index: index == last,
        "without_tools": lambda index: not messages[index].tool_calls,
        "flagged": lambda index: messages[index].train is True or messages[index].weight is not None,
    }
    weighted = [index for index, message in enumerate(messages) if message.loss_weight > 0]
    if not weighted:
        raise RefusedRow("nothing_to_train", "no assistant turn has a weight above 0")
    trained = [index for index in weighted if chosen[train_on](index)]
    if not trained:
        raise RefusedRow("nothing_to_train", f"no assistant turn is left by data.train_on: {train_on}")
    return trained


def check_shown(tokenizer: ChatTokenizer, conversation: Conversation) -> None:
    """Refuse a conversation of which the template leaves a part out without a word."""
    part = left_out(tokenizer, conversation)
    if part is not None:
        kind = "tools" if "tool" in part else "system"
        raise RefusedRow(f"template_lacks_{kind}", f"the template leaves out the {part}")


def _documents(renderings: Renderings, turns: list[Turn], trained_turns: str, notes: Counter[str]) -> list[Document]:
    """One document where the template never rewrites a turn, else what ``trained_turns`` says."""
    last = turns[-1]
    if all(last.text.startswith(turn.text) for turn in turns):
        return [_document(renderings, last, turns)]
    notes["rewritten_conversations"] += 1
    if trained_turns == "last":
        return [_document(renderings, last, [last])]
    if trained_turns == "as_rendered":
        return [_as_rendered(renderings, turns)]
    return [_document(renderings, turn, [turn], suffix=f"#turn{turn.index}") for turn in turns]


def _document(renderings: Renderings, whole: Turn, turns: list[Turn], suffix: str = "") -> Document:
    spans = tuple(
        Span(turn.start, turn.end, renderings.messages[turn.index].loss_weight, turn.markers > 0, turn.index)
        for turn in turns
    )
    return Document(whole.text, spans, _parts(renderings, whole.text, whole.index), whole.index, suffix)


def _as_rendered(renderings: Renderings, turns: list[Turn]) -> Document:
    """The conversation as the template prints it once, each turn found in it by substitution.

    A turn's words are found by substitution, its header by the generation prompts. Words that the template leaves out
    here (earlier reasoning) are not trained.
    """
    last = turns[-1]
    text = renderings.upto(last.index + 1)
    spans = []
    for turn in turns:
        message = renderings.messages[turn.index]
        substituted = renderings.substituted(turn.index, last.index + 1)
        begin, end, _ = own_words(text, substituted, message, turn.index)
        length, markers = closing(renderings.tokenizer, text[end:], most=max(1, turn.markers))
        start = _header_end(renderings, turn, text, begin, last.index + 1)
        spans.append(Span(start, end + length, message.loss_weight, markers > 0, turn.index))
    for before, after in itertools.pairwise(spans):
        if before.end > after.start:
            raise RefusedRow("masks_disagree", f"turns overlap at character {after.start} of the rendered conversation")
    end = spans[-1].end
    parts = _parts(renderings, text[:end], last.index)
    return Document(text[:end], tuple(spans), parts, last.index, as_history=True)


def _header_end(renderings: Renderings, turn: Turn, text: str, begin: int, count: int) -> int:
    """Where the header before character ``begin`` ends: behind the last generation prompt that stands there.

    ``text`` is the rendering of the first ``count`` messages.
    """
    before = renderings.upto(turn.index)
    headers = {prompt[common_prefix(prompt, before) :] for prompt in renderings.prompts(turn.index)}
    headers.add(turn.text[common_prefix(turn.text, before) : turn.start])
    found = [text.rindex(header, 0, begin) + len(header) for header in headers - {""} if header in text[:begin]]
    start = max(found, default=len(text[:begin].rstrip()))
    said = turn.index > 0 and (renderings.messages[turn.index - 1].content or "").strip()
    if said and renderings.last_words_before(turn.index, count)[1] > start:
        raise RefusedRow("masks_disagree", f"message {turn.index}: no header stands before its words as rendered")
    return start


def _parts(renderings: Renderings, text: str, last: int) -> tuple[tuple[int, str], ...]:
    """(end, role) of each message: where the rendering of the conversation up to it stops being the start of ``text``.

    Messages that this cannot tell apart are counted together ("system+user"): where a template refuses to render a
    part of a conversation, or prints a message otherwise than when it was the last.
    """
    parts: list[tuple[int, str]] = []
    pending: list[str] = []
    for index, message in enumerate(renderings.messages[: last + 1]):
        pending.append(message.role)
        end = len(text)
        if index < last:
            begin = parts[-1][0] if parts else 0
            try:
                end = common_prefix(text, renderings.upto(index + 1))
            except RefusedRow:
                continue
            if (message.content or "").strip() not in text[begin:end]:
                continue
        parts.append((end, "+".join(dict.fromkeys(pending))))
        pending = []
    return tuple(parts)
