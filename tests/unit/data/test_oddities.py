"""Rows count once per kind, sources by themselves, processes add up, and real conversations show what they have."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.encoding import texts_of
from posttrain_lib.data.oddities import KINDS, Oddities
from posttrain_lib.schema.examples import Conversation, Message

PLANTED = {
    "empty": " \n\t",
    "control_characters": "a\x1b[31mred",
    "replacement_characters": "na\ufffdve",
    "byte_order_marks": "\ufeffHello",
    "zero_width": "pass\u200bword",
    "bidi_controls": "access \u202e\u2066// admin\u2069\u2066",
    "private_use": "logo \uf8ff",
    "lone_surrogates": "half \ud83d",
    "mojibake": "itâ€™s",
    "not_nfc": "cafe\u0301",
    "mixed_script_words": "p\u0430ypal",
    "long_runs": "=" * 64,
    "long_words": "aGVsbG8g" * 32,
    "html": "R&amp;B",
    "placeholders": "Dear {{name}}",
}


def observed(*texts: tuple[str, str, str]) -> Oddities:
    found = Oddities()
    for source, row_id, text in texts:
        found.observe(source, row_id, "user", text)
    return found


def kinds(text: str) -> set[str]:
    return set(observed(("s", "r", text)).report()["s"]["oddities"])


def test_every_kind_is_planted() -> None:
    assert set(PLANTED) == set(KINDS)


def test_a_call_needs_no_words_beside_it() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    said = [Message("user", ""), Message("assistant", "", tool_calls=(call,)), Message("assistant", " ")]
    said += [Message("assistant", "So:", "I look.", (call,)), Message("assistant", None, tool_calls=(call,))]
    texts = texts_of(Conversation("s", "1", tuple(said)))
    assert texts == [("user", ""), ("assistant", " "), ("assistant", "So:"), ("assistant", "I look.")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_found_alone_and_told_where(kind: str) -> None:
    report = observed(("s", "fine", "All is well, naïve as it is: 10 €."), ("s", "odd", PLANTED[kind])).report()
    assert set(report["s"]["oddities"]) == {kind}
    found = report["s"]["oddities"][kind]
    assert found["rows"] == 1 and found["meaning"] == KINDS[kind]
    assert found["first"][0]["row_id"] == "odd" and found["first"][0]["role"] == "user"
    place = found["first"][0]["place"]
    assert place.startswith("character ") and place.isascii() and place.isprintable()
    json.dumps(report).encode()


@pytest.mark.parametrize("text", ["C1\x85", "bell\x07", "del\x7f", "é\x00"])
def test_control_characters_in_any_text(text: str) -> None:
    assert kinds(text) == {"control_characters"}


def test_tabs_and_line_ends_are_fine() -> None:
    assert kinds("a\tb\r\nc\n") == set() == kinds("é\tb\r\nc\n")


def test_a_row_counts_once_per_kind_and_the_first_three_are_named() -> None:
    texts = [("s", f"row {number // 2}", "x\x00") for number in range(12)]
    found = observed(*texts).report()["s"]["oddities"]["control_characters"]
    assert found["rows"] == 6
    assert [first["row_id"] for first in found["first"]] == ["row 0", "row 1", "row 2"]


def test_sources_are_apart() -> None:
    report = observed(("a", "1", "x\x00"), ("b", "1", "fine")).report()
    assert list(report) == ["a", "b"] and not report["b"]["oddities"] and report["a"]["oddities"]


def test_letters_by_script_and_rows_of_another() -> None:
    english = [("s", f"en {number}", "An English text of some length, as there are many. " * 4) for number in range(50)]
    russian = ("s", "ru", "Это русский текст среди английских.")
    term = ("s", "term", "The word мир means peace or world, depending on the context, as they say.")
    half = ("s", "half", "Translate this please: переведите это")
    report = observed(*english[:20], russian, term, half, *english[20:]).report()["s"]
    assert report["unusual_scripts"]["cyrillic"]["rows"] == 2
    assert [first["row_id"] for first in report["unusual_scripts"]["cyrillic"]["first"]] == ["ru", "half"]
    assert set(report["letters"]) == {"latin", "cyrillic"}
    assert sum(report["letters"].values()) == pytest.approx(1, abs=1e-5)  # rounded to six places each
    letters = sum(character.isalpha() for *_, text in (*english, russian, term, half) for character in text)
    cyrillic = sum("а" <= c.lower() <= "я" for *_, text in (russian, term, half) for c in text)
    assert report["letters"]["cyrillic"] == pytest.approx(cyrillic / letters, abs=1e-6)


def test_a_source_of_two_scripts_has_none_that_is_unusual() -> None:
    texts = [("s", str(number), "日本語のテキストです、ひらがなとカタカナ。") for number in range(5)]
    texts += [("s", f"en {number}", "A plain English text") for number in range(5)]
    assert observed(*texts).report()["s"]["unusual_scripts"] == {}


def test_control_tokens_are_no_placeholders() -> None:
    tokens = Oddities(frozenset({"<|im_end|>"}))
    tokens.observe("s", "1", "user", "a <|im_end|> b")
    tokens.observe("s", "2", "user", "a <|im_emd|> b")
    found = tokens.report()["s"]["oddities"]["placeholders"]
    assert found["rows"] == 1 and found["first"][0]["row_id"] == "2"


TEXTS = st.one_of(st.text(max_size=60), st.sampled_from(list(PLANTED.values())))
ROWS = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.lists(TEXTS, max_size=3)), max_size=12)


def of_rows(rows: list[tuple[int, tuple[str, list[str]]]]) -> Oddities:
    return observed(*((source, f"row {number}", text) for number, (source, texts) in rows for text in texts))


def without_first(report: Any) -> Any:
    if isinstance(report, dict):
        return {name: without_first(value) for name, value in report.items() if name != "first"}
    return report


@given(ROWS, st.integers(0, 12))
def test_parts_add_up_to_the_whole(rows: list[tuple[str, list[str]]], cut: int) -> None:
    numbered = list(enumerate(rows))
    merged = of_rows(numbered[:cut])
    merged.merge(pickle.loads(pickle.dumps(of_rows(numbered[cut:]))))
    whole = of_rows(numbered).report()
    assert merged.report() == whole
    assert without_first(of_rows(numbered[::-1]).report()) == without_first(whole)
    json.dumps(whole)


def test_real_conversations(real_data: Path) -> None:
    found = Oddities()
    with (real_data / "chat" / "chat.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            for message in row["messages"]:
                found.observe(row["source"], row["id"], message["role"], message["content"])
    report = found.report()
    assert all(source["letters"]["latin"] > 0.99 for source in report.values())
    # Each was looked up in the file: "fiancÃ©", a BOM between coordinates, a Chinese passage, "&#x27;doped&#x27;".
    chosen, positive = report["dpo-en-chosen"], report["lf-kto-positive"]
    assert chosen["oddities"]["mojibake"]["rows"] == 1
    assert r"fianc\xc3\xa9" in chosen["oddities"]["mojibake"]["first"][0]["place"]
    assert chosen["oddities"]["byte_order_marks"]["rows"] == 1
    assert positive["unusual_scripts"]["han"]["rows"] == 1
    assert "&#x27;doped" in positive["oddities"]["html"]["first"][0]["place"]
    assert "mojibake" not in report["oasst1"]["oddities"]
