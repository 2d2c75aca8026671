"""Conversations made by rule: multi-turn, of strongly skewed length, every answer verifiable.

Each conversation is a small world. Facts are stated ("Mira has the red kite."), and questions ask for one word that
stands somewhere in the conversation, or for one that follows by rule. No answer can be guessed from how often
it occurs: names, things, places and colours are drawn evenly, so the best constant answer is right in a few percent.

``group`` names the opening (system turn and first user turn). Openings never repeat, so conversations of different
groups share no prompt, neither the last nor one in the middle.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

NAMES = (
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
SYSTEM_TURNS = ("Answer in one word.", "Be brief.", "Read with care and answer in one word.")

MOST_EXCHANGES = 16


@dataclass
class _World:
    """What has been said so far: for each person their thing, its colour and the place; insertion order kept."""

    colour: dict[str, str] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)


class _Draw:
    """Draws built on ``Random.random`` alone, the one method whose sequence Python promises never to change."""

    def __init__(self, seed: int, index: int, attempt: int) -> None:
        self._random = random.Random(f"conversations/{seed}/{index}/{attempt}")

    def uniform(self) -> float:
        return self._random.random()

    def below(self, limit: int) -> int:
        return int(self._random.random() * limit)

    def pick(self, options: Any) -> Any:
        return options[self.below(len(options))]

    def distinct(self, options: Any, count: int) -> list[Any]:
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def normal(self) -> float:
        """Standard normal by Box-Muller."""
        return math.sqrt(-2.0 * math.log(1.0 - self.uniform())) * math.cos(2.0 * math.pi * self.uniform())


def generate_rows(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``rows`` conversations, the same for the same ``seed``: a shorter run is a prefix of a longer one.

    Each row is ``{"id", "group", "messages": [{"role", "content"}, ...]}``; roles are an optional system turn, then
    user and assistant in turn, the last being an assistant turn whose content is the verifiable answer.
    """
    openings: set[str] = set()
    for index in range(rows):
        attempt = 0
        while True:
            messages = _conversation(_Draw(seed, index, attempt))
            opening = "\x1f".join(
                message["content"] for message in messages[: 2 if messages[0]["role"] == "system" else 1]
            )
            group = hashlib.sha256(opening.encode()).hexdigest()[:16]
            if group not in openings:
                break
            attempt += 1
        openings.add(group)
        yield {"id": f"generated-{seed}-{index}", "group": group, "messages": messages}


def _conversation(draw: _Draw) -> list[dict[str, str]]:
    messages = []
    if draw.uniform() < 0.2:
        messages.append({"role": "system", "content": draw.pick(SYSTEM_TURNS)})
    exchanges = max(1, min(MOST_EXCHANGES, round(math.exp(0.3 + 0.9 * draw.normal()))))
    world = _World()
    for _ in range(exchanges):
        question, answer = _exchange(draw, world)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _exchange(draw: _Draw, world: _World) -> tuple[str, str]:
    if draw.uniform() < 0.25:
        return _word_list(draw)
    said = []
    room = min(len(NAMES), len(THINGS)) - len(world.owner)
    if room > 0 and (not world.owner or draw.uniform() < 0.4):
        said = [_state_fact(draw, world) for _ in range(min(room, 1 + draw.below(3)))]
    question, answer = _ask(draw, world)
    return " ".join([*said, question]), answer


def _state_fact(draw: _Draw, world: _World) -> str:
    """Say who has a thing not yet mentioned, and where they are; a person is mentioned once."""
    name = draw.pick([name for name in NAMES if name not in world.place])
    thing = draw.pick([thing for thing in THINGS if thing not in world.owner])
    colour, place = draw.pick(COLOURS), draw.pick(PLACES)
    world.owner[thing], world.colour[thing], world.place[name] = name, colour, place
    return f"{name} has the {colour} {thing} in the {place}."


def _ask(draw: _Draw, world: _World) -> tuple[str, str]:
    thing = draw.pick(list(world.owner))
    name = world.owner[thing]
    return draw.pick(
        (
            (f"Who has the {thing}?", name),
            (f"What colour is the {thing}?", world.colour[thing]),
            (f"What does {name} have?", thing),
            (f"Where is {name}?", world.place[name]),
        )
    )


def _word_list(draw: _Draw) -> tuple[str, str]:
    words = draw.distinct(THINGS + COLOURS + PLACES, 2 + draw.below(4))
    listed = " ".join(words)
    return draw.pick(
        (
            (f"Which word comes last: {listed}?", words[-1]),
            (f"Which word comes first: {listed}?", words[0]),
            (f"Repeat: {listed}", listed),
        )
    )
