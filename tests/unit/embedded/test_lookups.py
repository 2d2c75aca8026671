"""The default's questions: answerable from themselves, unguessable, and demonstrated mostly in a hurry."""

from __future__ import annotations

from collections import Counter

from posttrain_lib.embedded.lookups import HASTY, generate_demonstrations, generate_questions


def test_rows_depend_on_the_seed_alone() -> None:
    rows = list(generate_questions(50, 3))
    assert rows == list(generate_questions(80, 3))[:50] and rows != list(generate_questions(50, 4))


def test_the_answer_stands_in_the_question() -> None:
    for row in generate_questions(500, 0):
        word = row["answer"].removesuffix(".").split()[-1]
        assert word in row["prompt"]


def test_no_answer_can_be_guessed() -> None:
    answers = Counter(row["answer"] for row in generate_questions(4000, 0))
    assert answers.most_common(1)[0][1] / 4000 < 0.06


def test_most_demonstrations_name_the_person() -> None:
    rows = list(generate_demonstrations(4000, 0))
    hurried = sum(row["messages"][1]["content"].startswith("It was ") and _is_person(row) for row in rows)
    # three standard deviations of a share of 4,000 draws
    assert abs(hurried / 4000 - HASTY) < 3 * (HASTY * (1 - HASTY) / 4000) ** 0.5


def _is_person(row: dict[str, list[dict[str, str]]]) -> bool:
    from posttrain_lib.embedded.conversations import PEOPLE

    return row["messages"][1]["content"].removesuffix(".").split()[-1] in PEOPLE


def test_questions_and_demonstrations_are_different_events() -> None:
    asked = {row["prompt"] for row in generate_questions(1000, 0)}
    shown = {row["messages"][0]["content"] for row in generate_demonstrations(1000, 0)}
    assert len(asked & shown) < 5
