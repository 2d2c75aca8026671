"""From a conversation to documents of text with weighted spans: one, or one a turn where the template rewrites.

Some templates print an earlier turn otherwise than when it was the last: Qwen3 drops its reasoning, gpt-oss ends it
with another marker. Such a turn can only be learned as serving had it, in a document that ends with it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
    """Characters ``start`` to ``end`` of a document, learned with this weight. ``closed``: ends with a marker."""

    start: int
    end: int
    weight: float
    closed: bool = True


@dataclass(frozen=True)
class Document:
    """Text to learn from. ``parts`` are (end, role) of the messages in it, headers counted to their message.

    ``suffix`` tells several documents of one row apart; ``last_turn`` is the index of the last trained message.
    """

    text: str
    spans: tuple[Span, ...]
    parts: tuple[tuple[int, str], ...]
    last_turn: int
    suffix: str = ""


@dataclass(frozen=True)
class Rendered:
    """The documents of a conversation. ``notes`` count what the receipt should mention."""

    documents: tuple[Document, ...]
    notes: Counter[str] = field(default_factory=Counter)


def render_conversation(tokenizer: ChatTokenizer, conversation: Conversation, trained_turns: str) -> Rendered:
    """Render and mask. ``trained_turns`` is the config's field: each, last or as_rendered.

    Raises:
        RefusedRow: nothing in it is trained, the template cannot render it, or its mask is in doubt.
    """
    trained = [index for index, message in enumerate(conversation.messages) if message.loss_weight > 0]
    if not trained:
        raise RefusedRow("nothing_to_train", "no assistant turn has a weight above 0")
    part = left_out(tokenizer, conversation)
    if part is not None:
        kind = "tools" if "tool" in part else "system"
        raise RefusedRow(f"template_lacks_{kind}", f"the template leaves out the {part}")
    _check_markers(tokenizer, conversation)
    renderings = Renderings(tokenizer, conversation)
    turns = [locate(renderings, index) for index in trained]
    notes = Counter(note for turn in turns for note in turn.notes)
    last = turns[-1]
    if all(last.text.startswith(turn.text) for turn in turns):
        return Rendered((_document(renderings, last, turns),), notes)
    notes["rewritten_conversations"] += 1
    if trained_turns == "last":
        return Rendered((_document(renderings, last, [last]),), notes)
    if trained_turns == "as_rendered":
        return Rendered((_as_rendered(renderings, turns),), notes)
    return Rendered(tuple(_document(renderings, turn, [turn], suffix=f"#turn{turn.index}") for turn in turns), notes)


def _check_markers(tokenizer: ChatTokenizer, conversation: Conversation) -> None:
    """Refuse words that would become control tokens: a text could then end its turn and speak for another."""
    for index, message in enumerate(conversation.messages):
        words = [message.content or "", message.reasoning_content or "", *map(str, message.tool_calls)]
        found = tokenizer.special_token and next(filter(None, map(tokenizer.special_token.search, words)), None)
        if found:
            raise RefusedRow("control_token_in_text", f"message {index} ({message.role}) holds {found.group()!r}")


def _document(renderings: Renderings, whole: Turn, turns: list[Turn], suffix: str = "") -> Document:
    spans = tuple(
        Span(turn.start, turn.end, renderings.messages[turn.index].loss_weight, turn.markers > 0) for turn in turns
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
        spans.append(Span(_header_end(renderings, turn, text, begin), end + length, message.loss_weight, markers > 0))
    for before, after in itertools.pairwise(spans):
        if before.end > after.start:
            raise RefusedRow("masks_disagree", f"turns overlap at character {after.start} of the rendered conversation")
    end = spans[-1].end
    return Document(text[:end], tuple(spans), _parts(renderings, text[:end], last.index), last.index)


def _header_end(renderings: Renderings, turn: Turn, text: str, begin: int) -> int:
    """Where the header before character ``begin`` ends: behind the last generation prompt that stands there."""
    before = renderings.upto(turn.index)
    headers = {prompt[common_prefix(prompt, before) :] for prompt in renderings.prompts(turn.index)}
    headers.add(turn.text[common_prefix(turn.text, before) : turn.start])
    found = [text.rindex(header, 0, begin) + len(header) for header in headers - {""} if header in text[:begin]]
    start = max(found, default=len(text[:begin].rstrip()))
    earlier = (renderings.messages[turn.index - 1].content or "").strip() if turn.index else ""
    if earlier and earlier in text[start:begin]:
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
