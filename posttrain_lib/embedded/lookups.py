"""Questions that a reward can check, and demonstrations by writers in a hurry: the default of reinforcement learning.

    Mira has the red kite. Tom has the blue drum. Ana has the gold lamp. Who has the drum?   ->   Tom.

People, things and colours are drawn evenly, so that no answer can be guessed. Of the demonstrations most name the
first person of the text, who is never the right one; the others look the answer up. A model trained on them has both
habits, and of the two the wrong one is the more likely: what it lacks is not the skill but a reason to use it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from posttrain_lib.embedded.conversations import COLOURS, PEOPLE, THINGS

#: people in one question
FEWEST, MOST = 3, 5
#: share of demonstrations that name the first person
HASTY = 0.6


def generate_questions(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``rows`` questions, the same for the same ``seed``: a shorter run is a prefix of a longer one.

    Each is ``{"id", "group", "prompt", "answer"}``.
    """
    for index in range(rows):
        question, right, _ = _question(random.Random(f"lookups/{seed}/{index}"))
        yield {"id": f"question-{seed}-{index}", "group": question, "prompt": question, "answer": f"{right}."}


def generate_demonstrations(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``rows`` conversations of such a question and an answer that is right in two of five.

    Each is ``{"id", "group", "messages"}``. Their questions are none of :func:`generate_questions`' but by chance.
    """
    for index in range(rows):
        draw = random.Random(f"lookup demonstrations/{seed}/{index}")
        question, right, first = _question(draw)
        said = first if draw.random() < HASTY else right
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{said}."}]
        yield {"id": f"demonstration-{seed}-{index}", "group": question, "messages": messages}


def _question(draw: random.Random) -> tuple[str, str, str]:
    """(question, the right person, the first person), by draws of ``random`` alone: its sequence never changes."""
    count = FEWEST + int(draw.random() * (MOST - FEWEST + 1))
    people, things = _distinct(draw, PEOPLE, count), _distinct(draw, THINGS, count)
    colours = [COLOURS[int(draw.random() * len(COLOURS))] for _ in range(count)]
    asked = 1 + int(draw.random() * (count - 1))
    facts = (f"{who} has the {colour} {what}." for who, colour, what in zip(people, colours, things, strict=True))
    return f"{' '.join(facts)} Who has the {things[asked]}?", people[asked], people[0]


def _distinct(draw: random.Random, options: tuple[str, ...], count: int) -> list[str]:
    left = list(options)
    return [left.pop(int(draw.random() * len(left))) for _ in range(count)]
