"""Makes the default retrain's suite: ``python -m tests.support.retrain_suite > posttrain_lib/embedded/suite.jsonl``."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from posttrain_lib.embedded.conversations import COLOURS, DAYS, PEOPLE, PLACES, THINGS, generate_rows

ROWS = 60
#: no run file and no landing generates rows of this seed
SEED = 990_001
_KINDS = (PEOPLE, THINGS, COLOURS, PLACES, DAYS)


def suite_rows() -> Iterator[dict[str, Any]]:
    """Conversations of at most 4 turns, each with 4 answers of the right kind of which one is right."""
    draw, found = random.Random(SEED), 0
    for row in generate_rows(10 * ROWS, SEED):
        *prompt, last = row["messages"]
        if len(prompt) > 4 or found == ROWS:
            continue
        answer = last["content"]
        word, kind = next((word, kind) for kind in _KINDS for word in kind if word in answer.rstrip(".").split())
        others = draw.sample([each for each in kind if each != word], 3)
        choices = [answer, *(answer.replace(word, other) for other in others)]
        draw.shuffle(choices)
        found += 1
        yield {"prompt": prompt, "choices": choices, "answer": choices.index(answer)}


def suite_text() -> str:
    """The file's text."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in suite_rows())


if __name__ == "__main__":
    print(suite_text(), end="")
