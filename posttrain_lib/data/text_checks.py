"""Single checks of a text, for :mod:`posttrain_lib.data.oddities`: each yields (kind, character index) or nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from posttrain_lib.data.unicode_table import script_of

LONG_RUN = 64
LONG_WORD = 256

ASCII_CONTROLS = bytes([*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F])
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ZERO_WIDTH = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u2060-\u2064]|(?<![^\x00-\x7f])[\u200c\u200d]")

#: tags of running text; "<T>", "<iostream>" and "a < b" are code or mathematics
_HTML = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[lr][sd]quo|[mn]dash|hellip|copy|reg|trade|bull);"
    r"|</?(?:p|br|hr|b|i|u|em|strong|span|div|a|ul|ol|li|table|tr|td|th|h[1-6]|font|img|script|style|html|body|head)"
    r"(?:\s[^<>]*)?/?>"
)
_PLACEHOLDER = re.compile(r"\{\{[^{}\n]{1,80}\}\}|\{%[^{}\n]{1,80}%\}|<\|[^|<>\s]{1,64}\|>")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)

_WORD = re.compile(r"[^\W\d_]{2,}")
#: Greek letters that look like a Latin one: A B E Z H I K M N O P T Y X o
_LOOK_ALIKE = re.compile("[\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf]")
_NOT_COMPOSED = re.compile("[\u0300-\u036f]")


def _as_cp1252(byte: int) -> str:
    """The character that Windows-1252 shows for a byte; its five holes as Latin-1 has them, as browsers do."""
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


_BYTE_OF = {_as_cp1252(byte): byte for byte in range(0x80, 0x100)} | {chr(byte): byte for byte in range(0x80, 0x100)}
_TAIL = "[" + re.escape("".join(shown for shown, byte in _BYTE_OF.items() if 0x80 <= byte < 0xC0)) + "]"
# Two characters are common in honest text ("Ä»" closes a German quotation): a single pair counts only where it gives
# Latin-1, other pairs only in a row, as whole words of other scripts have them.
_MOJIBAKE = re.compile(
    f"[\u00c2\u00c3]{_TAIL}|[\u00c4-\u00df]{_TAIL}(?:[\u00c4-\u00df]{_TAIL})+"
    f"|[\u00e0-\u00ef]{_TAIL}{{2}}|[\u00f0-\u00f4]{_TAIL}{{3}}"
)
# What every alternative begins with, as one set of characters: found eight times faster than the alternatives.
_MOJIBAKE_START = re.compile(f"[\u00c2-\u00f4]{_TAIL}")
#: quotation marks of several languages, dashes and the ellipsis
_QUOTES = frozenset("\u201c\u201d\u2018\u2019\u201a\u201e\u00ab\u00bb\u2039\u203a\u2013\u2014\u2026")


def first_control(text: str) -> int:
    """Where the first control character stands, or -1."""
    found = _CONTROL.search(text)
    return found.start() if found else -1


def zero_width(text: str) -> Iterator[tuple[str, int]]:
    """Joiners belong between emoji and in Persian or Indic words; behind ASCII they only hide something."""
    found = _ZERO_WIDTH.search(text)
    if found:
        yield "zero_width", found.start()


def mojibake(text: str) -> Iterator[tuple[str, int]]:
    """Characters that, taken as the bytes which Windows-1252 shows so, are valid UTF-8."""
    for start in _MOJIBAKE_START.finditer(text):
        found = _MOJIBAKE.match(text, start.start())
        if found is None:
            continue
        shown, before = found.group(), text[found.start() - 1 : found.start()]
        if len(shown) == 2 and before.isupper() and shown[1] in _QUOTES:
            continue  # a word in capitals before a quotation mark
        try:
            decoded = bytes(_BYTE_OF[character] for character in shown).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not any(unicodedata.category(character) in ("Cc", "Cn", "Cs", "Co") for character in decoded):
            yield "mojibake", found.start()
            return


def mixed_script_words(text: str, scripts: set[str]) -> Iterator[tuple[str, int]]:
    """A Latin word with a Cyrillic or a look-alike Greek letter in it; ``scripts`` are those of the whole text."""
    if "latin" not in scripts or not scripts & {"cyrillic", "greek"}:
        return
    for word in _WORD.finditer(text):
        found = {script_of(letter) for letter in word.group()} if not word.group().isascii() else {"latin"}
        if "latin" in found and ("cyrillic" in found or ("greek" in found and _LOOK_ALIKE.search(word.group()))):
            yield "mixed_script_words", word.start()
            return


def not_composed(text: str) -> Iterator[tuple[str, int]]:
    """Tokenizers that normalise to NFC read this text otherwise than it was written."""
    if not unicodedata.is_normalized("NFC", text):
        found = _NOT_COMPOSED.search(text)
        yield "not_nfc", found.start() if found else 0


def markup(text: str, control_tokens: frozenset[str]) -> Iterator[tuple[str, int]]:
    """HTML outside code marks, and placeholders that nobody filled in."""
    if ("&" in text or "<" in text) and (found := _HTML.search(text)):
        if "`" in text:
            found = _HTML.search(_without_code(text))
        if found:
            yield "html", found.start()
    if "{{" in text or "{%" in text or "<|" in text:
        shown = _without_code(text) if "`" in text else text
        for found in _PLACEHOLDER.finditer(shown):
            if found.group() not in control_tokens:
                yield "placeholders", found.start()
                return


def _without_code(text: str) -> str:
    """The text with spaces where code stands, so that places stay."""
    return _CODE.sub(lambda found: " " * len(found.group()), text)


def long_stretches(text: str) -> Iterator[tuple[str, int]]:
    """Long runs of one character and long words, in a few steps per window and not per character."""
    if len(text) >= LONG_RUN and (at := _long_run(text)) >= 0:
        yield "long_runs", at
    if len(text) >= LONG_WORD and (at := _long_word(text)) >= 0:
        yield "long_words", at


def _long_run(text: str) -> int:
    """Every run of LONG_RUN holds one of every LONG_RUN-th characters, and reaches half as far to a side of that."""
    side = LONG_RUN // 2 - 1
    for at in range(LONG_RUN - 1, len(text), LONG_RUN):
        character = text[at]
        if text[at - side] != character and text[at + side : at + side + 1] != character:
            continue
        first = at
        while first and text[first - 1] == character:
            first -= 1
        if text.startswith(character * LONG_RUN, first):
            return first
    return -1


def _long_word(text: str) -> int:
    """From each break between words, look for the last one within the next LONG_WORD characters."""
    at = 0
    while at + LONG_WORD <= len(text):
        end = at + LONG_WORD
        last = max(text.rfind(" ", at, end), text.rfind("\n", at, end))
        if last < 0:
            breaks = (index for index in range(end - 1, at - 1, -1) if text[index].isspace() or text[index] > "\x7f")
            last = next(breaks, -1)
        if last < 0:
            return at
        at = last + 1
    return -1
