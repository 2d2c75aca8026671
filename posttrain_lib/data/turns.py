"""Which characters of a rendered conversation an assistant turn is: found by two independent methods.

1. *Prompt and answer*. Serving renders the messages before the turn, asks for an answer, and the model writes the
   rest. So the turn is what the rendering with the turn adds to that prompt.
2. *Substitution*. The turn's own words (content, reasoning, arguments of calls) are replaced by a character that no
   text has, and the conversation is rendered again. What differs between the two renderings came from the turn.

The methods agree when what the second finds lies inside what the first finds. The rest of the first's span is then
fixed text of the template, printed where the model writes: an opening such as ``<think>``, and the end-of-turn marker.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.schema.examples import Conversation, Message

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer, Variables

# Private-use characters: one for each part of a turn's own words, as many for calls as a turn may have.
_CONTENT, _REASONING = "\ue000", "\ue001"
_CALLS = [chr(0xE100 + number) for number in range(256)]
STAND_INS = frozenset((_CONTENT, _REASONING, *_CALLS))

#: a header is only cut behind one of these: text of the template, never the middle of a word
_HEADER_ENDS = (">", "\n", "]")


@dataclass(frozen=True)
class Turn:
    """An assistant turn and the text up to its end, as serving would have it.

    ``text[:start]`` is the prompt, ``text[start:end]`` the answer with its end-of-turn marker, and ``text`` ends there;
    ``text[own_start:own_end]`` came from the turn itself.
    ``markers`` counts its end-of-turn markers: 0 where the template prints none. ``notes`` name what deserves a count.
    """

    index: int
    text: str
    start: int
    own_start: int
    own_end: int
    markers: int
    notes: tuple[str, ...]

    @property
    def end(self) -> int:
        """Behind the last character."""
        return len(self.text)


class Renderings:
    """Renderings of one conversation under one template; each is made once."""

    def __init__(self, tokenizer: ChatTokenizer, conversation: Conversation) -> None:
        self.tokenizer = tokenizer
        self.messages = conversation.messages
        self._tools = conversation.tools
        self._upto: dict[int, str] = {}

    def upto(self, count: int) -> str:
        """The first ``count`` messages."""
        if count not in self._upto:
            self._upto[count] = self._render(self.messages[:count])
        return self._upto[count]

    def substituted(self, index: int, count: int) -> str:
        """The first ``count`` messages with the own words of message ``index`` replaced."""
        return self._render([*self.messages[:index], stand_in(self.messages[index]), *self.messages[index + 1 : count]])

    def last_words_before(self, index: int, count: int) -> tuple[int, int]:
        """(from, to) of the words of the message before ``index`` in the rendering of the first ``count`` messages.

        Found by substitution, so also where the template escapes them, as a tool's answer in JSON.

        Raises:
            RefusedRow: the template prints nothing of it.
        """
        before = self.messages[index - 1]
        begin, end, _ = own_words(self.upto(count), self.substituted(index - 1, count), before, index - 1)
        return begin, end

    def words_before_end(self, index: int) -> int:
        """Where the words of every message before ``index`` end in the rendering of the messages up to it."""
        text = self.upto(index + 1)
        others = self._render([*map(stand_in, self.messages[:index]), self.messages[index]])
        return len(text) - common_suffix(text, others)

    def prompts(self, index: int) -> Iterator[str]:
        """What serving sends before message ``index``: with thinking as the template has it, off, and on."""
        yield self._render(self.messages[:index], answer_next=True)
        if self.tokenizer.mentions("enable_thinking"):
            for thinking in (False, True):
                yield self._render(self.messages[:index], answer_next=True, variables={"enable_thinking": thinking})

    def _render(
        self, messages: Sequence[Message], answer_next: bool = False, variables: Variables | None = None
    ) -> str:
        return self.tokenizer.render(messages, self._tools, answer_next=answer_next, variables=variables)


def stand_in(message: Message) -> Message:
    """The message with each kind of its own words replaced by one character."""
    calls = tuple(
        {**call, "function": {**call["function"], "arguments": {mark: mark}}}
        for call, mark in zip(message.tool_calls, _CALLS, strict=False)
    )
    return dataclasses.replace(
        message,
        content=_CONTENT if (message.content or "").strip() else message.content,
        reasoning_content=_REASONING if message.reasoning_content else None,
        tool_calls=calls,
    )


def own_words(text: str, substituted: str, message: Message, index: int) -> tuple[int, int, tuple[str, ...]]:
    """(from, to, notes): the part of ``text`` that came from the message. ``text`` holds none of the stand-ins.

    Raises:
        RefusedRow: the template prints nothing of the message, or not its calls.
    """
    shown = STAND_INS & set(substituted)
    if missing := len(message.tool_calls) - len(shown.intersection(_CALLS)):
        raise RefusedRow(
            "template_lacks_tools",
            f"the template leaves out {missing} of {len(message.tool_calls)} tool calls of message {index}",
        )
    if not shown:
        raise RefusedRow("turn_not_rendered", f"the template prints nothing of message {index} ({message.role})")
    notes = []
    if message.reasoning_content and _REASONING not in shown:
        notes.append("reasoning_not_rendered")
    if (message.content or "").strip() and _CONTENT not in shown:
        notes.append("content_not_rendered")
    begin = common_prefix(text, substituted)
    return begin, len(text) - common_suffix(text[begin:], substituted[begin:]), tuple(notes)


def locate(renderings: Renderings, index: int) -> Turn:
    """Find assistant message ``index`` as the last of its conversation.

    Raises:
        RefusedRow: the template will not render it, or the two methods do not agree on where it is.
    """
    message = renderings.messages[index]
    text = renderings.upto(index + 1)
    if STAND_INS & set(text):
        raise RefusedRow("private_characters", "the text holds U+E000, U+E001 or U+E100 to U+E1FF: the masks need them")
    begin, end, notes = own_words(text, renderings.substituted(index, index + 1), message, index)
    prompt, cut, how = _prompt_before(renderings, index, text, begin)
    if cut > begin:
        raise RefusedRow(
            "masks_disagree",
            f"message {index}: its own words begin at character {begin}, the serving prompt ends only at {cut}",
        )
    length, markers = closing(renderings.tokenizer, text[end:])
    answer = text[cut : end + length]
    if "content_not_rendered" not in notes:
        _check_whole(message, answer, index)
    shift = len(prompt) - cut
    return Turn(index, prompt + answer, len(prompt), begin + shift, end + shift, markers, notes + how)


def _check_whole(message: Message, answer: str, index: int) -> None:
    """Refuse an answer that lacks some of its content, as where a template cuts content at a ``</think>`` in it."""
    said = "".join((message.content or "").split()).casefold()
    if said not in "".join(answer.split()).casefold():
        raise RefusedRow(
            "content_altered", f"the template prints message {index} otherwise than it is: {answer[:80]!r}"
        )


def _prompt_before(renderings: Renderings, index: int, text: str, begin: int) -> tuple[str, int, tuple[str, ...]]:
    """(prompt, where in ``text`` the answer starts, notes)."""
    prompts = list(renderings.prompts(index))
    for prompt in sorted(prompts, key=len, reverse=True):
        if text.startswith(prompt):
            return prompt, len(prompt), ()
    shared = _shared_header(renderings, index, text, begin, prompts[0])
    return shared or _moved(renderings, index, text, begin, prompts[0])


def _shared_header(
    renderings: Renderings, index: int, text: str, begin: int, prompt: str
) -> tuple[str, int, tuple[str, ...]] | None:
    """The prompt opens something (as a think block) that this turn does not have: what both print is the header."""
    before = renderings.upto(index)
    if not (text.startswith(before) and prompt.startswith(before)):
        return None
    shared = common_prefix(prompt, text[:begin])
    while shared > len(before) and not prompt[:shared].endswith(_HEADER_ENDS):
        shared -= 1
    return (text[:shared], shared, ("generation_prompt_differs",)) if shared > len(before) else None


def _moved(renderings: Renderings, index: int, text: str, begin: int, prompt: str) -> tuple[str, int, tuple[str, ...]]:
    """The template prints what stands before the turn otherwise once the turn is there: align the prompt's end.

    Mistral's moves the system text, gpt-oss drops the reasoning of earlier calls. The example is the serving prompt
    with the turn behind it. The end that both share must hold all words of the message before the turn: shared headers
    alone may be those of an earlier turn. No earlier words may stand behind it.
    """
    alike = _longest_shared_end(prompt, text[:begin])
    if index and alike and (renderings.messages[index - 1].content or "").strip():
        cut = text.rindex(prompt[-alike:], 0, begin) + alike
        first, last = renderings.last_words_before(index, index + 1)
        if cut - alike <= first and last <= cut and renderings.words_before_end(index) <= cut:
            return prompt, cut, ("prompt_rewritten",)
    raise RefusedRow(
        "masks_disagree",
        f"message {index}: what serving sends before it ({prompt[-60:]!r}) is not what stands before it in the "
        f"rendered conversation ({text[max(0, begin - 60) : begin]!r})",
    )


def _longest_shared_end(prompt: str, text: str) -> int:
    """Length of the longest end of ``prompt`` that stands anywhere in ``text``."""
    return bisect_left(range(1, len(prompt) + 1), True, key=lambda n: prompt[-n:] not in text)


def closing(tokenizer: ChatTokenizer, rest: str, most: int | None = None) -> tuple[int, int]:
    """(length of the end of a turn at the start of ``rest``, end-of-turn markers in it).

    The end is the first run of adjacent special tokens, of ``most`` of them where more may belong to the next turn;
    where the tokenizer has none there, all but trailing white space, as one marker.
    """
    marker = tokenizer.special_token
    found = marker.search(rest) if marker is not None else None
    if marker is None or found is None:
        length = len(rest.rstrip())
        return length, min(length, 1)
    count, end = 1, found.end()
    while count != most and (found := marker.match(rest, end)):
        count, end = count + 1, found.end()
    return end, count


def common_prefix(first: str, second: str) -> int:
    """Length of the longest common start; by halving, so that it runs at the speed of comparing strings."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    return bisect_left(range(1, limit + 1), True, key=lambda n: first[:n] != second[:n])


def common_suffix(first: str, second: str) -> int:
    """Length of the longest common end."""
    limit = min(len(first), len(second))
    if limit == 0 or first[-limit:] == second[-limit:]:
        return limit
    return bisect_left(range(1, limit + 1), True, key=lambda n: first[-n:] != second[-n:])
