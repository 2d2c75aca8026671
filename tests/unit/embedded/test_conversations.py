"""Generated conversations: the same for the same seed, well-formed, skewed, and every answer true by rule."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from posttrain_lib.embedded.conversations import COLOURS, DAYS, PEOPLE, PLACES, SMALL_TALK, THINGS, generate_rows

KINDS = {"person": PEOPLE, "colour": COLOURS, "thing": THINGS, "place": PLACES, "day": DAYS}
ASKS = {
    "Who": "person",
    "colour": "colour",
    "thing": "thing",
    "Where": "place",
    "place": "place",
    "When": "day",
    "day": "day",
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(generate_rows(2000, 0))


def test_the_same_seed_gives_the_same_rows_and_a_shorter_run_is_a_prefix(rows: list[dict]) -> None:
    assert list(generate_rows(50, 0)) == rows[:50]
    other = list(generate_rows(50, 1))
    assert [row["messages"] for row in other] != [row["messages"] for row in rows[:50]]


def test_roles_take_turns(rows: list[dict]) -> None:
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in row["messages"])
    with_system = sum(row["messages"][0]["role"] == "system" for row in rows)
    assert 0.15 < with_system / len(rows) < 0.25


def test_every_answer_is_the_word_of_the_right_kind_in_the_latest_event(rows: list[dict]) -> None:
    """An independent reading of the texts: no part of the generator is used but its word lists."""
    small_talk = dict(SMALL_TALK)
    for row in rows:
        event: dict[str, str] = {}
        turns = [message for message in row["messages"] if message["role"] != "system"]
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            text, answer = user["content"], assistant["content"]
            if text in small_talk:
                assert answer == small_talk[text]
                continue
            statement, _, question = text.rpartition(". ")
            if statement:
                words = re.findall(r"\w+", statement)
                event = {kind: next(word for word in words if word in options) for kind, options in KINDS.items()}
            kind = next(kind for word, kind in ASKS.items() if word in question)
            assert re.findall(r"\w+", answer)[-1] == event[kind], (text, answer)
        assert turns[-1]["content"] not in small_talk.values()


def test_groups_share_no_prompt(rows: list[dict]) -> None:
    assert len({row["group"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    prompts = Counter()
    for row in rows:
        said = [message["content"] for message in row["messages"]]
        roles = [message["role"] for message in row["messages"]]
        prompts.update(tuple(said[:end]) for end, role in enumerate(roles) if role == "assistant")
    assert max(prompts.values()) == 1


def test_lengths_are_strongly_skewed(rows: list[dict]) -> None:
    words = np.array([sum(len(re.findall(r"\w+|[^\w\s]", m["content"])) + 5 for m in row["messages"]) for row in rows])
    assert words.max() / words.mean() >= 7.5
    assert words.max() <= 512 - 10  # fits the default's max_example_tokens
    exchanges = [sum(message["role"] == "user" for message in row["messages"]) for row in rows]
    assert min(exchanges) == 1 and max(exchanges) >= 12 and np.mean(np.array(exchanges) > 1) > 0.3


def test_no_constant_answer_gets_far(rows: list[dict]) -> None:
    answers = Counter(row["messages"][-1]["content"] for row in rows)
    assert answers.most_common(1)[0][1] / len(rows) < 0.05
