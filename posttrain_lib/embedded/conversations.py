"""Conversations made by rule: multi-turn, of strongly skewed length, every answer verifiable.

The user says who did what with which thing, where and on which day, and asks for one of these; later questions are
about the latest event, however many turns lie between. The answer stands in the conversation, so it can be checked,
and it cannot be guessed: people, things, colours, places and days are drawn evenly and independently, and the best
constant answer is right in a few percent. To answer, a model has to find the word of the right kind in the latest
event, which is a skill and not a memory: held-out events are new combinations.

``group`` names the opening (system turn and first user turn). Openings never repeat, so conversations of different
groups share no prompt, neither the last one nor one in the middle.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PEOPLE = (
    "Mira", "Tom", "Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana",
    "Kai", "Lena", "Max", "Nora", "Omar", "Pia", "Rosa", "Sam", "Tara", "Uma", "Vera", "Zoe",
)  # fmt: skip
THINGS = (
    "kite", "drum", "lamp", "book", "coin", "ring", "boat", "bell", "cup", "hat", "key", "map",
    "ball", "rope", "flute", "box", "clock", "chair", "stone", "brush", "glass", "shoe", "pen", "doll",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "white", "black", "pink", "gold", "grey", "brown", "purple")
PLACES = (
    "garden", "kitchen", "tower", "cellar", "attic", "barn", "shop", "park", "school", "harbour", "forest", "cave",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

SYSTEM_TURNS = ("Be brief.", "Answer in one sentence.", "You remember what happened and answer in one sentence.")
STATEMENTS = (
    "{person} found a {colour} {thing} in the {place} on {day}.",
    "On {day} {person} left the {colour} {thing} in the {place}.",
    "In the {place} {person} saw a {colour} {thing} on {day}.",
)
# What is asked for -> the ways to ask, and the one right answer.
QUESTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Who was it?", "Who did that?"), "It was {person}."),
    (("What colour was it?", "Which colour did it have?"), "It was {colour}."),
    (("What thing was it?", "Which thing was there?"), "It was a {thing}."),
    (("Where was it?", "In which place was it?"), "It was in the {place}."),
    (("When was it?", "On which day was it?"), "It was on {day}."),
)
SMALL_TALK = (("Thank you.", "You are welcome."), ("Good to know.", "Ask me more."))

# The number of exchanges is lognormal: half of the conversations have one, few have dozens.
MEDIAN_EXCHANGES = 1.2
SPREAD_OF_EXCHANGES = 0.95
MOST_EXCHANGES = 30
# Counted in words and punctuation marks, which a tokenizer trained on these texts turns into about as many tokens.
LONGEST_CONVERSATION = 495
NEW_EVENT = 0.4
SYSTEM_SHARE = 0.2
SMALL_TALK_SHARE = 0.1


@dataclass(frozen=True)
class _Event:
    person: str
    thing: str
    colour: str
    place: str
    day: str


class _Draw:
    """Draws built on ``Random.random`` alone, the one method whose sequence Python promises never to change."""

    def __init__(self, seed: int, index: int, attempt: int) -> None:
        self._random = random.Random(f"conversations/{seed}/{index}/{attempt}")

    def happens(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self._random.random() * len(options))]

    def lognormal(self, median: float, spread: float) -> float:
        """By Box-Muller."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self._random.random()))
        return median * math.exp(spread * radius * math.cos(2.0 * math.pi * self._random.random()))


def generate_rows(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``rows`` conversations, the same for the same ``seed``: a shorter run is a prefix of a longer one.

    Each row is ``{"id", "group", "messages": [{"role", "content"}, ...]}``: a system turn in some, then user and
    assistant in turn, the last being an assistant turn whose content is the verifiable answer.
    """
    groups: set[str] = set()
    for index in range(rows):
        attempt, group, messages = 0, "", []
        while not group or group in groups:
            messages = _conversation(_Draw(seed, index, attempt))
            opening = messages[: 2 if messages[0]["role"] == "system" else 1]
            group = hashlib.sha256("\x1f".join(turn["content"] for turn in opening).encode()).hexdigest()[:16]
            attempt += 1
        groups.add(group)
        yield {"id": f"generated-{seed}-{index}", "group": group, "messages": messages}


def _conversation(draw: _Draw) -> list[dict[str, str]]:
    messages = []
    if draw.happens(SYSTEM_SHARE):
        messages.append({"role": "system", "content": draw.pick(SYSTEM_TURNS)})
    exchanges = min(MOST_EXCHANGES, max(1, round(draw.lognormal(MEDIAN_EXCHANGES, SPREAD_OF_EXCHANGES))))
    event: _Event | None = None
    size = sum(_size(message["content"]) for message in messages)
    for number in range(exchanges):
        last = number == exchanges - 1
        if event is not None and not last and draw.happens(SMALL_TALK_SHARE):
            said, answer = draw.pick(SMALL_TALK)
        else:
            event, said, answer = _question(draw, event)
        size += _size(said) + _size(answer)
        if size > LONGEST_CONVERSATION:
            break
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": answer})
    while messages[-1] in [{"role": "assistant", "content": answer} for _, answer in SMALL_TALK]:
        del messages[-2:]  # cut short behind small talk: the last answer has to be verifiable
    return messages


def _question(draw: _Draw, event: _Event | None) -> tuple[_Event, str, str]:
    """The event asked about (a new one, or the latest so far), the user's words and the answer."""
    said = ""
    if event is None or draw.happens(NEW_EVENT):
        event = _Event(draw.pick(PEOPLE), draw.pick(THINGS), draw.pick(COLOURS), draw.pick(PLACES), draw.pick(DAYS))
        said = draw.pick(STATEMENTS).format(**vars(event)) + " "
    ways, answer = draw.pick(QUESTIONS)
    return event, said + draw.pick(ways), answer.format(**vars(event))


def _size(text: str) -> int:
    """Tokens of a turn, about: its words and marks, and five for the header and the end of the turn."""
    return len(re.findall(r"\w+|[^\w\s]", text)) + 5
