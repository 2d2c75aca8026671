"""Signatures estimate Jaccard similarity, and the report finds who is alike: planted, real, crowded, in any order."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.config.data import DataConfig
from posttrain_lib.data import near_duplicates
from posttrain_lib.data.encoding import RawRow, RowEncoder
from posttrain_lib.data.near_duplicates import (
    LANES,
    SHINGLE_TOKENS,
    SIGNATURE_BYTES,
    THRESHOLD,
    NearDuplicates,
    compare,
    estimated_jaccard,
    signatures,
)
from posttrain_lib.data.receipt import Receipt
from posttrain_lib.errors import DataError

#: five standard errors of an estimate at similarity 0.5, where it is largest: one in a million estimates is further off
FIVE_SIGMA = 5 * (0.25 / LANES) ** 0.5


def ids_of(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def drawn(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 150_000, length).astype(np.int32)


def edited(ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Every token replaced, dropped or followed by another with probability ``share``."""
    generator = np.random.default_rng(seed)
    made: list[int] = []
    for token in ids.tolist():
        if generator.random() >= share:
            made.append(token)
            continue
        other = int(generator.integers(0, 150_000))
        made += ([other], [], [token, other])[int(generator.integers(3))]
    return np.array(made, np.int32)


def shingles(ids: np.ndarray) -> set[tuple[int, ...]]:
    width = min(SHINGLE_TOKENS, len(ids))
    return {tuple(ids[begin : begin + width].tolist()) for begin in range(len(ids) - width + 1)}


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    mine, theirs = shingles(one), shingles(other)
    return len(mine & theirs) / len(mine | theirs)


def estimate(one: np.ndarray, other: np.ndarray) -> float:
    lanes = signatures([one, other])[:, -LANES:]
    return estimated_jaccard(int((lanes[0] == lanes[1]).sum()))


def signature(ids: np.ndarray) -> bytes:
    return signatures([ids])[0].tobytes()


def filled(examples: Sequence[tuple[str, np.ndarray, bool]], rows: Sequence[str | int | None] = ()) -> NearDuplicates:
    """``rows`` of the examples; without any, each is a row of its own."""
    found = NearDuplicates()
    for (key, ids, held_out), row in itertools.zip_longest(examples, rows):
        found.add_signature(key, signature(ids), held_out=held_out, row=row)
    return found


@given(st.lists(st.lists(st.integers(0, 200_000), max_size=40), min_size=1, max_size=20), st.data())
def test_a_signature_does_not_depend_on_its_company(rows: list[list[int]], data: st.DataObject) -> None:
    examples = [ids_of(*row) for row in rows]
    together = signatures(examples)
    assert together.shape == (len(rows), SIGNATURE_BYTES) and together.dtype == np.uint8
    index = data.draw(st.integers(0, len(rows) - 1))
    assert signature(examples[index]) == together[index].tobytes() == signature(examples[index].astype(np.int64))


def test_blocks_change_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [drawn(length, length) for length in (0, 1, 4, 5, 6, 300, 900, 2)]
    whole = signatures(examples)
    monkeypatch.setattr(near_duplicates, "_BLOCK_TOKENS", 7)
    assert np.array_equal(signatures(examples), whole)


def test_a_signature_is_the_same_in_every_release() -> None:
    """Workers of one run may be different machines; a change of the hash is a change of what the figures mean."""
    assert signature(np.arange(300, dtype=np.int32)).hex()[:64] == (
        "31c4d357f4440759108dcb4b14645a7d4cdd0316e7e385a5277b6fd8d559080c"
    )


@pytest.mark.parametrize("length", [30, 100, 350, 3000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.2, 1.0])
def test_the_estimate_is_near_the_truth(length: int, share: float) -> None:
    one = drawn(length, length)
    other = edited(one, share, seed=length + 1)
    # Short examples have fewer shingles than lanes, and lanes that borrow from one shingle are right or wrong together.
    assert estimate(one, other) == pytest.approx(jaccard(one, other), abs=FIVE_SIGMA)


def test_estimates_are_not_biased() -> None:
    errors = []
    for seed in range(200):
        one = drawn(200, seed)
        other = edited(one, 0.03, seed + 1000)
        errors.append(estimate(one, other) - jaccard(one, other))
    # The mean of 200 estimates has a standard error of 0.003; three of them.
    assert abs(float(np.mean(errors))) < 0.009
    assert float(np.std(errors)) < 1.3 * (0.25 / LANES) ** 0.5


def test_what_is_alike_and_what_is_not() -> None:
    one, two = drawn(400, 1), drawn(400, 2)
    report = filled(
        [
            ("one", one, False),
            ("two", two, False),
            ("one again", one, False),
            ("one nearly", edited(one, 0.01, 5), False),
            ("two otherwise", edited(two, 0.3, 6), False),
            ("one, held out", edited(one, 0.01, 7), True),
            ("two, held out", two, True),
            ("new, held out", drawn(400, 3), True),
        ]
    ).report()
    assert report["examples"] == 8 and report["held_out"] == 3
    assert report["near_duplicates"] == 2 and report["exact"] == 1 and report["share"] == 2 / 8
    assert report["held_out_near_training"] == 2 and report["held_out_exactly_in_training"] == 1
    assert report["threshold"] == THRESHOLD and report["crowded"] == 0
    assert [(pair["a"], pair["b"]) for pair in report["first"]] == [("one", "one again"), ("one", "one nearly")]
    assert report["first"][0]["similarity"] == 1.0 and THRESHOLD <= report["first"][1]["similarity"] < 1
    named = {(pair["a"], pair["b"], pair["similarity"] == 1.0) for pair in report["first_held_out"]}
    assert ("two", "two, held out", True) in named and len(named) == 2
    assert json.loads(json.dumps(report)) == report


def test_nothing_is_like_nothing() -> None:
    report = NearDuplicates().report()
    assert report["examples"] == report["near_duplicates"] == report["held_out_near_training"] == 0
    assert report["share"] == 0.0 and report["first"] == []


def test_examples_shorter_than_a_shingle_are_whole() -> None:
    short = [ids_of(), ids_of(1), ids_of(1, 2), ids_of(2, 1), ids_of(1, 2), ids_of(1, 2, 3, 4), ids_of(1, 2, 3, 4, 5)]
    report = filled([(str(index), ids, False) for index, ids in enumerate(short)]).report()
    assert report["near_duplicates"] == report["exact"] == 1


def test_copies_count_each_and_crowd_nobody() -> None:
    one = drawn(100, 1)
    rows = [(str(index), one, index % 4 == 0) for index in range(1000)]
    report = filled(rows).report()
    assert report["exact"] == report["near_duplicates"] == 1000 - 2
    assert report["held_out_near_training"] == report["held_out_exactly_in_training"] == 250
    assert report["crowded"] == 0 and all(pair["a"] == "1" for pair in report["first_held_out"])


def test_a_copy_of_a_held_out_relative_is_a_relative_too() -> None:
    one = drawn(300, 1)
    near = edited(one, 0.01, 2)
    report = filled([("held a", near, True), ("held b", near, True), ("train", one, False)]).report()
    assert report["held_out_near_training"] == 2 and report["held_out_exactly_in_training"] == 0
    assert {(pair["a"], pair["b"]) for pair in report["first_held_out"]} == {("train", "held a"), ("train", "held b")}


def test_order_changes_no_count() -> None:
    rows = []
    for family in range(40):  # families of two: no chains, in which the order may matter
        one = drawn(150, family)
        rows += [(f"{family} a", one, family % 5 == 0), (f"{family} b", edited(one, 0.01, family), family % 3 == 0)]
    expected = filled(rows).report()
    assert expected["near_duplicates"] > 10 and expected["held_out_near_training"] > 5
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        report = filled(rows).report()
        for name in ("near_duplicates", "exact", "held_out_near_training"):
            assert report[name] == expected[name]


def test_a_report_can_be_asked_for_again() -> None:
    found = filled([(f"row {i}", edited(drawn(120, i // 3), 0.01, i), i % 7 == 0) for i in range(90)])
    report = found.report()
    assert report == found.report() and report["near_duplicates"] > 30


def talk(seed: int, turns: int) -> list[np.ndarray]:
    """The documents of a conversation, one a turn: each is the one before it and some more."""
    words = drawn(400 + 20 * turns, seed)
    return [words[: 400 + 20 * turn] for turn in range(1, turns + 1)]


def documents(talks: Sequence[list[np.ndarray]]) -> tuple[list[tuple[str, np.ndarray, bool]], list[str | int | None]]:
    """The examples of several rows, and the row of each."""
    named = [(row, place, ids) for row, talk in enumerate(talks) for place, ids in enumerate(talk)]
    return [(f"s: {row}#turn{place}", ids, False) for row, place, ids in named], [f"s: {row}" for row, _, _ in named]


@pytest.mark.parametrize("turns", [2, 3, 30])
def test_the_documents_of_one_row_are_no_duplicates_of_each_other(turns: int) -> None:
    examples, rows = documents([talk(seed, turns) for seed in range(20)])
    report = filled(examples, rows).report()
    assert report["near_duplicates"] == report["exact"] == report["crowded"] == 0 and report["first"] == []
    assert filled(examples).report()["near_duplicates"] > 0  # they are alike


@pytest.mark.parametrize("turns", [2, 3, 30])
def test_alike_rows_are_found_turn_by_turn(turns: int) -> None:
    """Own documents, more of them than a window holds, do not hide another row's."""
    first = talk(0, turns)
    again = [edited(ids, 0.005, seed) for seed, ids in enumerate(talk(0, turns))]
    examples, rows = documents([first, talk(1, turns), again])
    report = filled(examples, rows).report()
    assert report["near_duplicates"] == turns
    assert {pair["a"].partition("#")[0] for pair in report["first"]} == {"s: 0"}
    assert {pair["b"].partition("#")[0] for pair in report["first"]} == {"s: 2"}


REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}({{ m.content }}){% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def receipt_of(folder: Path, template: Path, source_format: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Near-duplicates as the preparation counts them."""
    source = {"name": "s", "path": "x", "format": source_format}
    settings = {"sources": [source], "engine": "hf", "chat_template": str(template), "max_example_tokens": 4096}
    config = DataConfig.model_validate(settings)
    encoder, receipt = RowEncoder(config, folder), Receipt(0.0)
    encoded, _ = encoder.encode([RawRow(0, 0, number, f"a#b.jsonl:{number}", row) for number, row in enumerate(rows)])
    for row in encoded:
        assert row.refused is None and len(row.examples) > 1
        receipt.row("s")
        for example in row.examples:
            receipt.example("s", example, kind=row.kind, held_out=False, bos_id=None)
    return receipt.near_duplicates()


@pytest.mark.parametrize("source_format", ["messages", "preference"])
def test_a_receipt_holds_rows_against_rows(chatml_folder: Path, tmp_path: Path, source_format: str) -> None:
    (template := tmp_path / "own.jinja").write_text(REWRITING)

    def row(seed: int) -> dict[str, Any]:
        draw = random.Random(seed)
        long, *short = (" ".join(str(draw.randrange(10**6)) for _ in range(words)) for words in (80, 2, 2, 2))
        if source_format == "preference":
            return {"prompt": long, "chosen": short[0], "rejected": short[1]}
        roles = ("user", "assistant", "user", "assistant")
        said = [{"role": role, "content": text} for role, text in zip(roles, (long, *short), strict=True)]
        return {"messages": said}

    rows = [row(seed) for seed in range(8)]
    apart = receipt_of(chatml_folder, template, source_format, rows)
    assert apart["examples"] == 16 and apart["near_duplicates"] == 0
    again = receipt_of(chatml_folder, template, source_format, [*rows, rows[0]])
    assert again["near_duplicates"] == again["exact"] == 2


def test_copies_within_a_row_count_only_against_another_row() -> None:
    one = drawn(200, 1)
    examples = [(name, one, False) for name in ("a1", "a2", "b1", "a3", "b2")]
    report = filled(examples, ["a", "a", "b", "a", "b"]).report()
    assert report["exact"] == report["near_duplicates"] == 3
    pairs = [(pair["a"], pair["b"]) for pair in report["first"]]
    assert pairs == [("a1", "b1"), ("b1", "a3"), ("a1", "b2")]
    assert filled(examples[:2], [7, 7]).report()["near_duplicates"] == 0
    assert filled(examples[:2], [7, "7"]).report()["near_duplicates"] == 1
    assert filled(examples[:2], [None, None]).report()["near_duplicates"] == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=25))
def test_identical_ones_are_those_of_other_rows(drawn_rows: list[tuple[int, int, bool]]) -> None:
    """Against the definition, over all pairs; a row's examples share a split."""
    examples = [(content, row, (row + held) % 2 == 0) for content, row, held in drawn_rows]
    contents = signatures([drawn(50, seed) for seed in range(4)])
    made = contents[[content for content, _, _ in examples]]
    held, rows = (np.array([example[at] for example in examples]) for at in (2, 1))
    found = compare(made, held.astype(bool), rows.astype(int))
    for place, (content, row, split) in enumerate(examples):
        before = [at for at, other in enumerate(examples[:place]) if other[0] == content and other[2] == split]
        others = [at for at in before if examples[at][1] != row]
        assert found.exact[place] == bool(others)
        if others:
            assert found.same_split[1][place] == others[0]
        trained = [at for at, other in enumerate(examples) if other[0] == content and not other[2]]
        assert found.exactly_in_training[place] == (split and bool(trained))


@pytest.mark.parametrize("size", [0, SIGNATURE_BYTES - 1, SIGNATURE_BYTES + 1])
def test_another_thing_than_a_signature_is_named(size: int) -> None:
    with pytest.raises(DataError, match="row 7") as caught:
        NearDuplicates().add_signature("row 7", bytes(size), held_out=False)
    assert str(SIGNATURE_BYTES) in str(caught.value)


def test_a_long_common_prompt_crowds_and_its_duplicates_are_still_found() -> None:
    """3,000 examples of one 300-token prompt and 150 tokens of their own are about half alike, and no duplicates."""
    prompt = drawn(300, 0)
    own = [np.concatenate([prompt, drawn(150, 1 + index)]) for index in range(3000)]
    near = [edited(own[index], 0.005, index) for index in range(0, 3000, 20)]
    truly = [jaccard(own[20 * index], ids) for index, ids in enumerate(near)]
    examples = signatures([*own, *near])
    found = compare(examples, np.zeros(len(examples), bool))
    similar = np.array([estimated_jaccard(int(matches)) for matches in found.same_split[0]]) >= THRESHOLD
    assert found.crowded.sum() > 1000
    assert similar[:3000].sum() == 0
    clearly = np.array(truly) >= THRESHOLD + 0.1  # three standard errors of an estimate
    assert clearly.sum() > 100 and similar[3000:][clearly].mean() >= 0.95


def test_training_is_found_in_a_crowd_of_held_out_relatives() -> None:
    one = drawn(400, 0)
    rows = [(f"held {index}", edited(one, 0.005, index), True) for index in range(300)]
    report = filled([*rows[:150], ("train", one, False), *rows[150:]]).report()
    assert report["crowded"] == 301 and report["held_out_near_training"] == 300
    assert report["near_duplicates"] == 299


def test_real_conversations(real_data: Path) -> None:
    """Words for tokens, against exact similarity over all pairs: no clear relative is missed, none is invented."""
    with (real_data / "chat" / "chat.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(1200), strict=False)]
    texts = ["\n".join(message["content"] for message in row["messages"]) for row in rows]
    number: dict[str, int] = {}
    examples = [
        ids_of(*(number.setdefault(word, len(number)) for word in re.findall(r"\w+|[^\w\s]", text))) for text in texts
    ]
    found = compare(signatures(examples), np.zeros(len(examples), bool))
    sets = [shingles(ids) for ids in examples]
    relatives = 0
    where: dict[tuple[int, ...], list[int]] = {}
    for index, own in enumerate(sets):
        common: dict[int, int] = {}
        for shingle in own:
            for other in where.get(shingle, ()):
                common[other] = common.get(other, 0) + 1
            where.setdefault(shingle, []).append(index)
        exact = max((count / (len(own) + len(sets[other]) - count) for other, count in common.items()), default=0.0)
        estimated = estimated_jaccard(int(found.same_split[0][index]))
        if exact >= THRESHOLD + 0.1 or estimated >= THRESHOLD:
            relatives += 1
            assert estimated == pytest.approx(exact, abs=0.11), rows[index]["id"]  # three standard errors
    assert relatives > 0
