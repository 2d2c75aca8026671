"""Each finding is planted and found, no order changes a count, and a slow twin agrees on random pairs."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.pair_checks import FINDINGS, NEARLY_IDENTICAL, PairChecks


@dataclass(frozen=True)
class Pair:
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    held_out: bool = False


def checked(pairs: list[Pair]) -> PairChecks:
    found = PairChecks()
    for number, pair in enumerate(pairs):
        ids = [np.array(part, np.int32) for part in (pair.prompt, pair.chosen, pair.rejected)]
        found.add(f"row {number}", *ids, held_out=pair.held_out)
    return found


def rows_of(report: dict[str, Any]) -> dict[str, int]:
    return {name: finding["rows"] for name, finding in report["findings"].items()}


def expected_rows(pairs: list[Pair]) -> dict[str, int]:
    """The definitions, pair by pair with every other."""
    rows: Counter[str] = Counter(dict.fromkeys(FINDINGS, 0))
    for index, pair in enumerate(pairs):
        short, long = sorted((pair.chosen, pair.rejected), key=len)
        common = sum((Counter(short) & Counter(long)).values())
        if short == long:
            rows["identical"] += 1
        elif long[: len(short)] == short:
            rows["prefix"] += 1
        elif common >= NEARLY_IDENTICAL * (len(short) + len(long) - common):
            rows["nearly_identical"] += 1
        rows["repeated"] += pair in pairs[:index]
        honest = [other for other in pairs if other.chosen != other.rejected]
        if pair in honest:
            chosen = {other.chosen for other in honest if other.prompt == pair.prompt}
            rejected = {other.rejected for other in honest if other.prompt == pair.prompt}
            rows["contradicting"] += pair.chosen in rejected or pair.rejected in chosen
            if not pair.held_out:
                rows["chosen_rejected_elsewhere"] += pair.chosen in {other.rejected for other in honest}
        if pair.held_out:
            training = [other for other in pairs if not other.held_out]
            rows["held_out_prompt_in_training"] += pair.prompt in {other.prompt for other in training}
            rows["held_out_pair_in_training"] += Pair(pair.prompt, pair.chosen, pair.rejected) in training
    return dict(rows)


PARTS = st.lists(st.integers(0, 2), max_size=3).map(tuple)
PAIRS = st.lists(st.builds(Pair, PARTS, PARTS, PARTS, st.booleans()), max_size=12)


@given(PAIRS, st.randoms(use_true_random=False))
def test_findings_are_as_defined_in_any_order(pairs: list[Pair], shuffle: random.Random) -> None:
    whole = checked(pairs).report()
    assert rows_of(whole) == expected_rows(pairs)
    shuffled = list(pairs)
    shuffle.shuffle(shuffled)
    report = checked(shuffled).report()
    assert rows_of(report) == rows_of(whole) and report["lengths"] == whole["lengths"]
    json.dumps(whole)


LONG = tuple(range(100, 140))


@pytest.mark.parametrize(
    ("finding", "pairs", "rows"),
    [
        ("identical", [Pair((1,), LONG, LONG)], ["row 0"]),
        ("prefix", [Pair((1,), LONG, LONG[:20]), Pair((2,), (), LONG)], ["row 0", "row 1"]),
        ("nearly_identical", [Pair((1,), LONG, (*LONG[:20], 7, *LONG[21:]))], ["row 0"]),
        ("nearly_identical", [Pair((1,), LONG, LONG[::-1])], ["row 0"]),
        ("nearly_identical", [Pair((1,), LONG, LONG[3:])], ["row 0"]),
        ("repeated", [Pair((1,), (2,), (3,)), Pair((1,), (2,), (3,)), Pair((1,), (2,), (3,), True)], ["row 1"]),
        ("contradicting", [Pair((1,), (2,), (3,)), Pair((1,), (3,), (2,))], ["row 0", "row 1"]),
        ("contradicting", [Pair((1,), (2,), (3,)), Pair((1,), (3,), (4,))], ["row 0", "row 1"]),
        ("chosen_rejected_elsewhere", [Pair((1,), (2,), (3,)), Pair((9,), (4,), (2,))], ["row 0"]),
        ("held_out_prompt_in_training", [Pair((1,), (2,), (3,)), Pair((1,), (5,), (6,), True)], ["row 1"]),
        ("held_out_pair_in_training", [Pair((1,), (2,), (3,)), Pair((1,), (2,), (3,), True)], ["row 1"]),
    ],
)
def test_a_finding_names_its_rows(finding: str, pairs: list[Pair], rows: list[str]) -> None:
    found = checked(pairs).report()["findings"][finding]
    assert found["first"] == rows and found["rows"] == len(rows)
    assert found["share"] == len(rows) / len(pairs) and found["meaning"] == FINDINGS[finding]


def test_different_answers_are_no_finding() -> None:
    pairs = [Pair((number,), LONG[number:], (*range(number, 30), number)) for number in range(10)]
    assert not any(rows_of(checked(pairs).report()).values())


def test_lengths() -> None:
    pairs = [Pair((1,), (2,) * 30, (3,) * 10), Pair((2,), (4,) * 20, (5,) * 20), Pair((3,), (6,), (7,) * 3)]
    lengths = checked([*pairs, Pair((4,), (8,) * 4, (9,), held_out=True)]).report()["lengths"]
    assert lengths["training"] == {
        "pairs": 3, "mean_chosen_tokens": 17.0, "mean_rejected_tokens": 11.0,
        "chosen_longer": 1 / 3, "rejected_longer": 1 / 3,
    }  # fmt: skip
    assert lengths["held_out"]["chosen_longer"] == 1.0 and lengths["held_out"]["pairs"] == 1


def test_no_pairs() -> None:
    report = PairChecks().report()
    assert report["pairs"] == 0 and not any(rows_of(report).values())


def test_more_than_five_rows_are_counted_and_five_named() -> None:
    found = checked([Pair((number,), (1,), (1,)) for number in range(9)]).report()["findings"]["identical"]
    assert found["rows"] == 9 and found["first"] == [f"row {number}" for number in range(5)]


def test_real_preferences(real_data: Path) -> None:
    """Characters for tokens; what is found agrees with a search over the texts themselves."""
    with (real_data / "preference" / "pairs.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found, pairs = PairChecks(), []
    for number, row in enumerate(rows):
        prompt = json.dumps(row["prompt"])
        chosen, rejected = (json.dumps(row[name]) for name in ("chosen", "rejected"))
        pairs.append((prompt, chosen, rejected))
        ids = [np.frombuffer(text.encode("utf-32-le"), "<i4") for text in pairs[-1]]
        found.add(row["id"], *ids, held_out=number % 10 == 0)
    report = found.report()
    counted = rows_of(report)
    assert counted["identical"] == sum(chosen == rejected for _, chosen, rejected in pairs)
    chosen_to = {(prompt, chosen) for prompt, chosen, _ in pairs}
    rejected_to = {(prompt, rejected) for prompt, _, rejected in pairs}
    both = chosen_to & rejected_to
    contradicting = sum((prompt, chosen) in both or (prompt, rejected) in both for prompt, chosen, rejected in pairs)
    assert counted["contradicting"] == contradicting > 0  # several people judged the same answers
    training = {prompt for number, (prompt, *_) in enumerate(pairs) if number % 10}
    assert counted["held_out_prompt_in_training"] == sum(prompt in training for prompt, *_ in pairs[::10]) > 0
