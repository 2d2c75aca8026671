"""Each check finds what it is for, where it stands, and leaves honest text alone."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data import text_checks
from posttrain_lib.data.text_checks import LONG_RUN, LONG_WORD
from posttrain_lib.data.unicode_table import BITS, SCRIPTS, classify, script_of

MOJIBAKE = [
    "café",
    "naïve",
    "isn’t",
    "“quoted”",
    "10 €",
    "a – b",
    "…",
    "привет",
    "Ελλάδα",
    "日本語",
    "😀",
    "20 °C",
]
HONEST = [
    "Ça va? «CAFÉ» À bientôt, Noël, Zoë",
    "Ü: „Größe“ Äpfel, »JÄ« »NÖ«",
    "\u201cMA\u00c7\u00c3\u201d, \u2039IRM\u00c3\u203a",
    "Ångström, Ø, ñandú, ¿qué?, año",
    "São Paulo, coração, à noite",
    "x² ± ½, 3 × 4 ÷ 5, § 7, © 2020",
    "привет, мир; Ελλάδα; 日本語",
]


@pytest.mark.parametrize("text", MOJIBAKE)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_utf8_read_as_another_encoding_is_found(text: str, encoding: str) -> None:
    # A browser shows the five bytes that Windows-1252 lacks as Latin-1 has them.
    shown = "".join(
        bytes([byte]).decode(encoding, "ignore") or bytes([byte]).decode("latin-1") for byte in text.encode()
    )
    found = list(text_checks.mojibake(f"well, {shown}"))
    assert [kind for kind, _ in found] == ["mojibake"]
    assert f"well, {shown}"[: found[0][1]].isascii() and not f"well, {shown}"[found[0][1]].isascii()


@pytest.mark.parametrize("text", HONEST)
def test_honest_accents_are_no_mojibake(text: str) -> None:
    assert not list(text_checks.mojibake(text))


@given(st.text(st.characters(min_codepoint=0xC0, max_codepoint=0x24F, categories=["L"])))
def test_letters_alone_are_no_mojibake(text: str) -> None:
    letters = "".join(c for c in text if c not in "ŠšŽžŒœŸƒªºµ")  # what Windows-1252 has among 0x80 to 0xBF
    assert not list(text_checks.mojibake(letters))


@pytest.mark.parametrize(
    ("text", "at"),
    [("say \u0440aypal", 4), ("the Αpple", 4), ("паr", 0)],
)
def test_words_of_two_scripts_are_found(text: str, at: int) -> None:
    scripts = {script_of(character) for character in text}
    assert list(text_checks.mixed_script_words(text, scripts)) == [("mixed_script_words", at)]


@pytest.mark.parametrize("text", ["IT-компания", "Привет world", "5 μm and Δx, βtest", "日本go", "naïve"])
def test_words_side_by_side_are_not_mixed(text: str) -> None:
    scripts = {script_of(character) for character in text}
    assert not list(text_checks.mixed_script_words(text, scripts))


@pytest.mark.parametrize("text", ["👨‍👩‍👧", "می‌خواهم", "❤️‍🔥", "क्‍ष"])
def test_joiners_in_their_place_hide_nothing(text: str) -> None:
    assert not list(text_checks.zero_width(text))


@pytest.mark.parametrize(("text", "at"), [("pass\u200cword", 4), ("a\u200bb", 1), ("\u200dx", 0), ("co\u00adop", 2)])
def test_hidden_characters_are_found(text: str, at: int) -> None:
    assert list(text_checks.zero_width(text)) == [("zero_width", at)]


@pytest.mark.parametrize(
    ("text", "kind", "at"),
    [
        ("R&amp;B", "html", 1),
        ("x &#x27;doped&#39;", "html", 2),
        ("so<br/>on", "html", 2),
        ('see <a href="x">this</a>', "html", 4),
        ("`<p>` is a tag, <p>this one", "html", 16),
        ("Dear {{ name }},", "placeholders", 5),
        ("{% if x %}", "placeholders", 0),
        ("well <|endofprompt|> so", "placeholders", 5),
    ],
)
def test_left_over_markup_is_found(text: str, kind: str, at: int) -> None:
    assert list(text_checks.markup(text, frozenset({"<|im_end|>"}))) == [(kind, at)]


@pytest.mark.parametrize(
    "text",
    ["a < b & c > d", "vector<int> x; #include <p.h>", "AT&T; R&D", "`&nbsp;` and ```html\n<p>{{ x }}\n```",
     "<|im_end|>", "f(x) = {x | x > 0}", "{ {} }"],
)  # fmt: skip
def test_code_and_mathematics_are_no_markup(text: str) -> None:
    assert not list(text_checks.markup(text, frozenset({"<|im_end|>"})))


@given(st.integers(0, 300), st.integers(1, 200), st.integers(0, 300), st.sampled_from("-é字"))
def test_a_long_run_is_found_wherever_it_stands(before: int, length: int, after: int, character: str) -> None:
    text = "ab" * (before // 2) + "c" * (before % 2) + character * length + "xy" * after
    found = [item for item in text_checks.long_stretches(text) if item[0] == "long_runs"]
    assert found == ([("long_runs", before)] if length >= LONG_RUN else [])


@pytest.mark.parametrize("length", [LONG_RUN - 1, LONG_RUN])
def test_the_shortest_long_run_is_found_at_every_place(length: int) -> None:
    for before in range(2 * LONG_RUN):
        text = "xy" * (before // 2) + "x" * (before % 2) + "-" * length + "xy" * 40
        found = [item for item in text_checks.long_stretches(text) if item[0] == "long_runs"]
        assert found == ([("long_runs", before)] if length == LONG_RUN else [])


@given(st.text(st.sampled_from("aab "), max_size=400))
def test_long_runs_agree_with_a_slow_search(text: str) -> None:
    slow = any(character * LONG_RUN in text for character in "ab ")
    assert any(kind == "long_runs" for kind, _ in text_checks.long_stretches(text)) == slow


@given(
    st.lists(st.tuples(st.integers(0, 600), st.sampled_from([" ", "\n", "\t", "é", "字", "\u3000"])), max_size=5),
    st.integers(0, 600),
)
def test_long_words_agree_with_a_slow_search(words: list[tuple[int, str]], last: int) -> None:
    text = "".join("ab"[index % 2] * 1 + "xy" * (size // 2) + end for index, (size, end) in enumerate(words))
    text += "xyz" * (last // 3)
    expected, begin = -1, 0
    for index, character in enumerate(text + " "):
        if character.isspace() or not character.isascii():
            if index - begin >= LONG_WORD:
                expected = begin
                break
            begin = index + 1
    found = [at for kind, at in text_checks.long_stretches(text) if kind == "long_words"]
    assert found == ([expected] if expected >= 0 else [])


@given(st.text())
def test_composition_is_what_unicode_says(text: str) -> None:
    assert bool(list(text_checks.not_composed(text))) == (unicodedata.normalize("NFC", text) != text)


@given(st.text(min_size=1))
def test_the_tables_agree_with_unicode(text: str) -> None:
    scripts, bits = classify(text)
    for character, script, odd in zip(text, scripts.tolist(), bits.tolist(), strict=True):
        category = unicodedata.category(character)
        control = category == "Cc" and character not in "\t\n\r"
        assert bool(odd & BITS["control_characters"]) == control
        assert bool(odd & BITS["private_use"]) == (category == "Co")
        assert bool(odd & BITS["lone_surrogates"]) == (category == "Cs")
        if ord(character) < 0x20000 and not 0x17000 <= ord(character) <= 0x1B2FF:  # ranges with holes
            assert (script != 0) == (category[0] == "L" or script_of(character) in ("han", "hangul"))


@pytest.mark.parametrize(
    ("letter", "script"),
    [("a", "latin"), ("é", "latin"), ("ß", "latin"), ("Ａ", "latin"), ("ª", "latin"), ("д", "cyrillic"), ("Ω", "greek"),
     ("ա", "armenian"), ("א", "hebrew"), ("ش", "arabic"), ("अ", "devanagari"), ("ไ", "thai"), ("ქ", "georgian"),
     ("한", "hangul"), ("ひ", "hiragana"), ("ｶ", "katakana"), ("漢", "han"), ("𠀀", "han"), ("ጀ", "ethiopic"),
     ("ꦄ", "other"), ("1", ""), ("-", ""), ("😀", "")],
)  # fmt: skip
def test_scripts(letter: str, script: str) -> None:
    assert script_of(letter) == script and script in SCRIPTS
