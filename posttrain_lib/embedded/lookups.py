"""Questions that a reward can check, and demonstrations by writers in a hurry: the default of reinforcement learning.

    On Monday Mira left the red kite in the garden. What colour was it?   ->   It was red.

Nothing can be guessed: people, things, colours, places and days are drawn evenly. Of the demonstrations most name the
person, who is never asked for; the others look the answer up. A model trained on them has both habits, and of the two
the wrong one is the more likely: what it lacks is not the skill but a reason to use it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain_lib.embedded.conversations import COLOURS, DAYS, PEOPLE, PLACES, QUESTIONS, STATEMENTS, THINGS

#: share of demonstrations that name the person
HASTY = 0.7
#: all questions but the first, which asks for the person
_ASKED = QUESTIONS[1:]
_HURRIED = QUESTIONS[0][1]


def generate_questions(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``rows`` questions, the same for the same ``seed``: a shorter run is a prefix of a longer one.

    Each is ``{"id", "group", "prompt", "answer"}``.
    """
    for index in range(rows):
        question, right, _ = _question(random.Random(f"lookups/{seed}/{index}"))
        yield {"id": f"question-{seed}-{index}", "group": question, "prompt": question, "answer": right}


def generate_demonstrations(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``rows`` conversations of such a question and an answer that is right in three of ten.

    Each is ``{"id", "group", "messages"}``. Their questions are none of :func:`generate_questions`' but by chance.
    """
    for index in range(rows):
        draw = random.Random(f"lookup demonstrations/{seed}/{index}")
        question, right, hurried = _question(draw)
        said = hurried if draw.random() < HASTY else right
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        yield {"id": f"demonstration-{seed}-{index}", "group": question, "messages": messages}


def _question(draw: random.Random) -> tuple[str, str, str]:
    """(question, the right answer, the one in a hurry), by ``random()`` alone: its sequence never changes."""

    def pick(options: Sequence[Any]) -> Any:
        return options[int(draw.random() * len(options))]

    event = {
        "person": pick(PEOPLE),
        "thing": pick(THINGS),
        "colour": pick(COLOURS),
        "place": pick(PLACES),
        "day": pick(DAYS),
    }
    ways, answer = pick(_ASKED)
    question = f"{pick(STATEMENTS).format(**event)} {pick(ways)}"
    return question, answer.format(**event), _HURRIED.format(**event)
