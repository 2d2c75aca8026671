"""Odd characters in texts: scripts, invisible and control characters, broken encodings, left-over markup.

Nothing is refused for being odd: a count and the first places, for a person to judge. What is told is the *script*
(Latin, Cyrillic, Han, ...), not the language: a French row among English ones is not found here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain_lib.data import text_checks
from posttrain_lib.data.unicode_table import BITS, LETTERS_OF_ASCII, SCRIPTS, classify

#: kind -> what it means; the order of the report
KINDS = {
    "empty": "no character but white space",
    "control_characters": "control characters (Cc) other than tab, line feed and carriage return",
    "replacement_characters": "U+FFFD: bytes that somebody could not decode",
    "byte_order_marks": "U+FEFF",
    "zero_width": "characters of no width; joiners only where the text before them is ASCII",
    "bidi_controls": "embeddings, overrides, isolates: they reorder what a person sees (Trojan Source, CVE-2021-42574)",
    "private_use": "characters without a public meaning",
    "lone_surrogates": "halves of a UTF-16 pair: not valid text",
    "mojibake": "UTF-8 that was read as Windows-1252",
    "not_nfc": "not in Unicode's composed form (NFC)",
    "mixed_script_words": "one word of Latin and of Cyrillic or look-alike Greek letters (UTS 39)",
    "long_runs": f"one character {text_checks.LONG_RUN} times or more on end",
    "long_words": f"{text_checks.LONG_WORD} or more ASCII characters without white space, as base64 has",
    "html": "HTML entities or tags outside code",
    "placeholders": "template placeholders: {{...}}, {%...%}, or <|...|> that is no control token",
}

#: a script is present in a text by this share of its letters and so many of them: names and terms are no finding
_PRESENT_SHARE, _PRESENT_LETTERS = 0.3, 10
#: a script with this share of a source's letters is usual there
_USUAL_SHARE = 0.1
_FIRST = 3
_INVISIBLE = (
    "control_characters",
    "replacement_characters",
    "byte_order_marks",
    "bidi_controls",
    "private_use",
    "lone_surrogates",
)


@dataclass
class _Found:
    """Rows of a kind: how many, the first places, and the last row, so that it counts once."""

    rows: int = 0
    first: list[dict[str, str]] = field(default_factory=list)
    last_row: str | None = None

    def see(self, row_id: str, role: str, text: str, at: int) -> None:
        if row_id != self.last_row:
            self.rows, self.last_row = self.rows + 1, row_id
            if len(self.first) < _FIRST:
                self.first.append({"row_id": row_id, "role": role, "place": _place(text, at)})

    def merge(self, other: _Found) -> None:
        self.rows += other.rows
        self.first = [*self.first, *other.first][:_FIRST]
        self.last_row = other.last_row


@dataclass
class _Source:
    texts: int = 0
    characters: int = 0
    letters: Counter[str] = field(default_factory=Counter)
    found: dict[str, _Found] = field(default_factory=dict)
    scripts: dict[str, _Found] = field(default_factory=dict)

    def merge(self, other: _Source) -> None:
        self.texts += other.texts
        self.characters += other.characters
        self.letters.update(other.letters)
        for mine, theirs in ((self.found, other.found), (self.scripts, other.scripts)):
            for name, found in theirs.items():
                mine.setdefault(name, _Found()).merge(found)


class Oddities:
    """Counts over texts, per source. Picklable; processes fill one each, and :meth:`merge` adds them up.

    The texts of a row must come one after the other and to one object, since a row counts once per kind. Counts do not
    depend on the order of the rows; the first places do.
    """

    def __init__(self, control_tokens: frozenset[str] = frozenset()) -> None:
        """``control_tokens``: what the tokenizer reads as control, such as ``<|im_end|>``: no placeholder here."""
        self._control_tokens = control_tokens
        self._sources: dict[str, _Source] = {}

    def observe(self, source: str, row_id: str, role: str, text: str) -> None:
        """Look at one text: a turn's content. ``role`` is only told beside the places."""
        counts = self._sources.get(source)
        if counts is None:
            counts = self._sources[source] = _Source()
        counts.texts += 1
        counts.characters += len(text)
        for kind, at in self._oddities(counts, row_id, role, text):
            counts.found.setdefault(kind, _Found()).see(row_id, role, text, at)

    def merge(self, other: Oddities) -> None:
        """Add the other's counts; its first places come behind these."""
        for name, counts in other._sources.items():
            self._sources.setdefault(name, _Source()).merge(counts)

    def report(self) -> dict[str, Any]:
        """JSON-ready, per source: ``texts``, ``characters``, ``letters`` (share per script), ``unusual_scripts`` and
        ``oddities``: each with its count of ``rows`` and the ``first`` places. What was not found is left out."""
        return {name: _source_report(counts) for name, counts in sorted(self._sources.items())}

    def _oddities(self, counts: _Source, row_id: str, role: str, text: str) -> Iterator[tuple[str, int]]:
        """(kind, at which character), each kind once."""
        if not text or text.isspace():
            yield "empty", 0
            return
        if text.isascii():
            others = text.encode().translate(None, LETTERS_OF_ASCII)
            letters = len(text) - len(others)
            if letters:
                counts.letters["latin"] += letters
            if letters >= _PRESENT_LETTERS:
                counts.scripts.setdefault("latin", _Found()).see(row_id, role, text, 0)
            if len(others.translate(None, text_checks.ASCII_CONTROLS)) != len(others):
                yield "control_characters", text_checks.first_control(text)
        else:
            yield from _beyond_ascii(counts, row_id, role, text)
        yield from text_checks.markup(text, self._control_tokens)
        yield from text_checks.long_stretches(text)


def _beyond_ascii(counts: _Source, row_id: str, role: str, text: str) -> Iterator[tuple[str, int]]:
    scripts, bits = classify(text)
    numbers = np.bincount(scripts, minlength=len(SCRIPTS))[1:]  # 0 is no letter
    total = int(numbers.sum())
    present = np.flatnonzero(numbers).tolist()
    for index in present:
        name, number = SCRIPTS[index + 1], int(numbers[index])
        counts.letters[name] += number
        if number >= max(_PRESENT_LETTERS, _PRESENT_SHARE * total):
            at = int(np.argmax(scripts == index + 1))
            counts.scripts.setdefault(name, _Found()).see(row_id, role, text, at)
    held = int(np.bitwise_or.reduce(bits))
    for kind in _INVISIBLE:
        if held & BITS[kind]:
            yield kind, int(np.argmax(bits & BITS[kind] != 0))
    if held & (BITS["zero_width"] | BITS["joiner"]):
        yield from text_checks.zero_width(text)
    if held & BITS["mojibake_lead"]:
        yield from text_checks.mojibake(text)
    if len(present) > 1:
        yield from text_checks.mixed_script_words(text, {SCRIPTS[index + 1] for index in present})
    yield from text_checks.not_composed(text)


def _source_report(counts: _Source) -> dict[str, Any]:
    total = max(1, counts.letters.total())
    unusual = {
        name: found for name, found in sorted(counts.scripts.items()) if counts.letters[name] / total < _USUAL_SHARE
    }
    return {
        "texts": counts.texts,
        "characters": counts.characters,
        "letters": {name: round(number / total, 6) for name, number in _by_number(counts.letters)},
        "unusual_scripts": {name: {"rows": found.rows, "first": found.first} for name, found in unusual.items()},
        "oddities": {
            kind: {"rows": counts.found[kind].rows, "meaning": meaning, "first": counts.found[kind].first}
            for kind, meaning in KINDS.items()
            if kind in counts.found
        },
    }


def _by_number(letters: Counter[str]) -> list[tuple[str, int]]:
    return sorted(letters.items(), key=lambda item: (-item[1], item[0]))


def _place(text: str, at: int) -> str:
    """Where, and what stands there, in ASCII: invisible characters show as escapes."""
    return f"character {at}: {text[max(0, at - 12) : at + 20]!a}"
