"""Script and oddity of every character, as tables: two look-ups a character.

Python's ``unicodedata`` knows no scripts, but a letter's name begins with its script ("CYRILLIC SMALL LETTER A").
"""

from __future__ import annotations

import sys
import unicodedata
from functools import lru_cache

import numpy as np

#: 0 is no letter; "other" is a letter of any script that has no entry of its own
SCRIPTS = (
    "", "latin", "cyrillic", "greek", "armenian", "hebrew", "arabic", "devanagari", "bengali", "gurmukhi", "gujarati",
    "tamil", "telugu", "kannada", "malayalam", "sinhala", "thai", "lao", "tibetan", "myanmar", "georgian", "ethiopic",
    "khmer", "mongolian", "hangul", "hiragana", "katakana", "han", "other",
)  # fmt: skip
#: kind -> its bit in the table of oddities
BITS = {
    "control_characters": 1,
    "replacement_characters": 2,
    "byte_order_marks": 4,
    "zero_width": 8,
    "joiner": 16,
    "bidi_controls": 32,
    "private_use": 64,
    "lone_surrogates": 128,
    "mojibake_lead": 256,
}
LETTERS_OF_ASCII = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

#: letters whose names say no script, or that are too many to ask one by one: first, last, script
_RANGES = (
    (0x3400, 0x4DBF, "han"), (0x4E00, 0x9FFF, "han"), (0x20000, 0x3FFFD, "han"), (0xAC00, 0xD7A3, "hangul"),
    (0x17000, 0x18CFF, "other"), (0x1B170, 0x1B2FF, "other"),
)  # fmt: skip
_ODD = (
    (0x00, 0x08, "control_characters"), (0x0B, 0x0C, "control_characters"), (0x0E, 0x1F, "control_characters"),
    (0x7F, 0x9F, "control_characters"), (0xFFFD, 0xFFFD, "replacement_characters"),
    (0xFEFF, 0xFEFF, "byte_order_marks"), (0xAD, 0xAD, "zero_width"), (0x61C, 0x61C, "zero_width"),
    (0x180E, 0x180E, "zero_width"), (0x200B, 0x200B, "zero_width"), (0x200C, 0x200D, "joiner"),
    (0x200E, 0x200F, "zero_width"), (0x2060, 0x2064, "zero_width"), (0x202A, 0x202E, "bidi_controls"),
    (0x2066, 0x2069, "bidi_controls"), (0xE000, 0xF8FF, "private_use"), (0xF0000, 0xFFFFD, "private_use"),
    (0x100000, 0x10FFFD, "private_use"), (0xD800, 0xDFFF, "lone_surrogates"), (0xC2, 0xF4, "mojibake_lead"),
)  # fmt: skip
_PREFIXES = ("FULLWIDTH", "HALFWIDTH", "MODIFIER LETTER")


def classify(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Per character: index in SCRIPTS uint8 [len(text)], and bits of BITS uint16 [len(text)]."""
    scripts, odd = _tables()
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return scripts[points], odd[points]


def script_of(character: str) -> str:
    """Name in SCRIPTS of one character."""
    return SCRIPTS[_tables()[0][ord(character)]]


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Made at the first use, in some 0.1 s."""
    scripts = np.zeros(sys.maxunicode + 1, np.uint8)
    odd = np.zeros(sys.maxunicode + 1, np.uint16)
    for first, last, script in _RANGES:
        scripts[first : last + 1] = SCRIPTS.index(script)
    for point in range(0x20000):  # above there are ideographs, tags and private use
        if not scripts[point] and unicodedata.category(chr(point))[0] == "L":
            scripts[point] = SCRIPTS.index(_script_by_name(chr(point)))
    for first, last, kind in _ODD:
        odd[first : last + 1] |= BITS[kind]
    return scripts, odd


def _script_by_name(letter: str) -> str:
    name = unicodedata.name(letter, "")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix).lstrip(" -")
    word = name.partition(" ")[0].lower()
    if word in ("cjk", "ideographic"):
        return "han"
    if word in ("feminine", "masculine"):  # the ordinal signs of Spanish and Portuguese
        return "latin"
    if word == "micro":
        return "greek"
    return word if word in SCRIPTS[1:] else "other"
