"""Pairs of a right and a wrong answer, made of the generated conversations.

The wrong answer is of the right kind, with another value than the event's: another colour, another place. It is drawn
evenly, so that no answer is wrong more often than right; a model tells the two apart only by reading the event.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from posttrain_lib.embedded.conversations import COLOURS, DAYS, PEOPLE, PLACES, QUESTIONS, THINGS, generate_rows

_VALUES = {"person": PEOPLE, "colour": COLOURS, "thing": THINGS, "place": PLACES, "day": DAYS}


def generate_pairs(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``rows`` pairs, the same for the same ``seed``: a shorter run is a prefix of a longer one.

    Each is ``{"id", "group", "prompt": [messages], "chosen": [message], "rejected": [message]}``: a generated
    conversation without its last answer, that answer, and a wrong one.
    """
    for row in generate_rows(rows, seed):
        *prompt, last = row["messages"]
        wrong = {"role": "assistant", "content": _wrong(last["content"], random.Random(f"pairs/{row['id']}"))}
        yield {"id": row["id"], "group": row["group"], "prompt": prompt, "chosen": [last], "rejected": [wrong]}


def _wrong(answer: str, draw: random.Random) -> str:
    """The answer with another value of the same kind."""
    for _, form in QUESTIONS:
        kind = form[form.index("{") + 1 : form.index("}")]
        value = re.fullmatch(re.escape(form).replace(re.escape(f"{{{kind}}}"), "(.+)"), answer)
        if value and value[1] in _VALUES[kind]:
            others = [other for other in _VALUES[kind] if other != value[1]]
            # random() alone has a sequence that Python promises never to change
            return form.format(**{kind: others[int(draw.random() * len(others))]})
    raise ValueError(f"no generated answer: {answer!r}")
