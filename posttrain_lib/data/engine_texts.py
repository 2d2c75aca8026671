"""Texts on which tokenizers are known to part ways: what two engines must agree on before one stands in for the other.

Normal forms, white space, digits, case, marks, scripts, damaged text, and the tokenizer's own markers everywhere. Made
from a seed: the same markers and seed give the same texts.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from posttrain_lib.schema.examples import Message

#: white space of every kind that a pattern's ``\\s`` may or may not mean, and what looks like it
_SPACES = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e\u2000\u2003\u2007\u200a"
    "\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff"
)
#: (first, last) code points of what ordinary and odd text is made of
_BLOCKS = (
    (0x20, 0x7E),
    (0x00, 0x1F),
    (0x7F, 0xFF),
    (0x100, 0x24F),
    (0x2B0, 0x36F),  # modifier letters, combining marks
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x5B0, 0x6FF),  # Hebrew points to Arabic
    (0x900, 0x97F),  # Devanagari
    (0xE00, 0xE7F),  # Thai
    (0xF40, 0xFBC),  # Tibetan: characters that NFC takes apart
    (0x1100, 0x11FF),  # Hangul letters that NFC puts together
    (0x1E00, 0x1FFF),  # Latin and Greek with marks
    (0x2000, 0x206F),
    (0x20D0, 0x218F),  # marks for symbols, letter-like symbols, number forms
    (0x2460, 0x24FF),
    (0x3000, 0x30FF),
    (0x4E00, 0x4FFF),
    (0xAC00, 0xAD00),
    (0xE000, 0xE020),  # private use
    (0xF900, 0xFAFF),  # compatibility ideographs: NFC replaces them
    (0xFB1D, 0xFB4F),
    (0xFDD0, 0xFDEF),  # no characters
    (0xFE00, 0xFE2F),
    (0xFF00, 0xFFFF),
    (0x1D15E, 0x1D1C0),  # musical symbols: NFC takes them apart
    (0x1D400, 0x1D7FF),  # mathematical letters and digits
    (0x1F1E6, 0x1F64F),
    (0x20000, 0x20100),
    (0xE0000, 0xE01EF),
)
#: markers that get every case; some vocabularies have hundreds of reserved ones, and these get one each
_IN_DETAIL = 40
#: characters of the longest texts: what holds in a short one may not where a reader works in blocks or by the thread
_LONG = 20_000
_SYLLABLES = (
    "an",
    "be",
    "cor",
    "dis",
    "ed",
    "fi",
    "ing",
    "lo",
    "men",
    "or",
    "pre",
    "qua",
    "st",
    "tion",
    "un",
    "ver",
    "wy",
)
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'\u017f", "\u2019s", "'x", "''", "'s't")
_FIXED = (
    "",
    " ",
    "hello world",
    " leading and trailing \n",
    "caf\u00e9 cafe\u0301 \u212b \u212a \u1e9b\u0323 q\u0307\u0323 q\u0323\u0307",
    "\u0301lone mark \u0301 and\n\u0301again \u0300\u0301\u0302\u0327\u0328",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3067\u3059\u3002",
    "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c \u0664\u0662",
    "0 1 12 123 1234 12345 1234567890123 3.14159 1,000,000 \u0664\u0665\u0666 \u2167 \u00bd \u2460",
    "DON'T don't we'LL I'\u017f they've 'tis rock'n'roll l'\u00e9t\u00e9",
    "def f(x):\n\tif x  ==  1:\n\t\treturn {'a': [1, 2]}  # why\n\n\n    else:\r\n        pass\r\n",
    'for (int i = 0; i < n; ++i) { a[i] += b->c ? 1e-9 : "\\u00e9\\n"; } // \u2192 \u00b1',
    "<|im_start|<|im_end <|endoftext |> </s <s > [INST [/INST] <| |>",
    "\ufffd\ufffd \ufffda\ufffd \ufeffbom \u00ad soft",
    "\x00\x01\x02\x7f\x80\x9f null\x00inside",
    "camelCaseWORDSAndHTMLParser XMLHttpRequest \u01c5\u01c8 \u00aa\u00ba \u02b0 \u0130\u0131 \u1e9e\u00df",
    "\uac00\u11a8 \u0f73\u0f75\u0f81 \u0958\u095f \u2126 \uf900 \U0002f800 \U0001d15e \ufb2c",
)
_RUNS = (
    "a",
    "A",
    " ",
    "\n",
    "\r\n",
    "\t",
    "0",
    ".",
    "=",
    "ab",
    "\u00e9",
    "e\u0301",
    "\u0301",
    "\u4e2d",
    "\U0001f600",
    "\xa0",
    "'s",
)


_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Says what a word means, e.g. \u201ccaf\u00e9\u201d.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"word": "caf\u00e9"}}}
_ASK = Message("user", "What does caf\u00e9 mean?\n\n1. short\n2. long\t\U0001f600")
_ANSWER = Message("assistant", "  A place for coffee:\n```python\nprint('caf\u00e9')\n```\n")
#: (messages, tools) of conversations of several kinds
SAMPLES: tuple[tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]], ...] = (
    ((_ASK, _ANSWER), ()),
    ((Message("system", "You are brief. "), _ASK, _ANSWER, Message("user", "\u8c22\u8c22"), _ANSWER), ()),
    ((_ASK, Message("assistant", "Coffee.", reasoning_content="French.\n\nSo: coffee.")), ()),
    (
        (
            Message("system", "Use the tool."),
            _ASK,
            Message("assistant", "", tool_calls=(_CALL,)),
            Message("tool", '{"meaning": "a place"}', extra={"tool_call_id": "call00001", "name": "look_up"}),
            _ANSWER,
        ),
        (_TOOL,),
    ),
)


def gate_texts(markers: Sequence[str], rendered: Sequence[str] = (), *, seed: int = 0, rounds: int = 6) -> list[str]:
    """The set for a tokenizer.

    Args:
        markers: contents of all its added tokens.
        rendered: conversations in its chat template.
        seed: of the random part.
        rounds: size of the random part.
    """
    draw = random.Random(seed)
    texts = [*_FIXED, *rendered, *(text for place in range(len(markers)) for text in _around(place, markers, draw))]
    texts += [character * length for character in _RUNS for length in (2, 3, 4, 7, 33, 700)]
    texts += [f"a{space}{more}b{space}" for space in _SPACES for more in ("", space, " ", "\n")]
    kinds: tuple[Callable[[random.Random], str], ...] = (
        _prose,
        _any_characters,
        _blocks,
        _spaces,
        _marks,
        _bytes,
        _digits,
    )
    for _ in range(rounds):
        for kind in kinds:
            text = kind(draw)
            texts += [text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)]
            if markers:
                texts.append(_with_markers(text, markers, draw))
    return texts + list(_long(markers, draw))


def _long(markers: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Texts of :data:`_LONG` characters: prose with markers in it, one word, white space, punctuation, Chinese."""
    prose = ""
    while len(prose) < _LONG:
        prose += _prose(draw) + (draw.choice(markers) if markers else "\n")
    yield prose
    yield "a" * _LONG
    for alphabet in ("abcdefghijklmnopqrstuvwxyz", " \n\t\r", "!@#$%^&*()_+-=[]{}|;:,.<>/?"):
        yield "".join(draw.choices(alphabet, k=_LONG))
    yield "".join(chr(draw.randint(0x4E00, 0x9FFF)) for _ in range(_LONG))


def _around(place: int, markers: Sequence[str], draw: random.Random) -> Iterator[str]:
    """A marker alone, doubled, between words, within white space, damaged, beside marks and beside another."""
    marker, other = markers[place], draw.choice(markers)
    yield f"word{marker}word {marker} word\n{marker}\n  {marker}  end{marker}{marker}"
    if place >= _IN_DETAIL:
        return
    yield marker
    yield marker + marker
    yield f"{marker}\u0301{other}{marker}{other}\u00e9{marker[:-1]} {marker[1:]}\u4e2d{marker}\t"


def _with_markers(text: str, markers: Sequence[str], draw: random.Random) -> str:
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(text))
        text = text[:place] + draw.choice(markers) + text[place:]
    return text


def _prose(draw: random.Random) -> str:
    words = []
    for _ in range(draw.randint(20, 80)):
        word = "".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4)))
        word = draw.choice((word, word, word, word.title(), word.upper(), str(draw.randint(0, 99999))))
        words.append(word + draw.choice(("", "", "", ",", ".", "!", "?\n", "\n\n", ":", draw.choice(_CONTRACTIONS))))
    return " ".join(words)


def _any_characters(draw: random.Random) -> str:
    points = (draw.randrange(0x110000 - 0x800) for _ in range(draw.randint(1, 200)))
    return "".join(chr(point if point < 0xD800 else point + 0x800) for point in points)


def _blocks(draw: random.Random) -> str:
    chosen = draw.choices(_BLOCKS, k=3)
    return "".join(chr(draw.randint(*draw.choice(chosen))) for _ in range(draw.randint(1, 200)))


def _spaces(draw: random.Random) -> str:
    alphabet = _SPACES + "  \n\nab1.'\u00e9\u0301"
    return "".join(draw.choices(alphabet, k=draw.randint(1, 100)))


def _marks(draw: random.Random) -> str:
    bases = "aeoq\u00e9\u1100\u1161\u11a8\u0928\u05d0 \n1'"
    marks = [chr(draw.randint(*draw.choice(((0x300, 0x36F), (0x591, 0x5BD), (0x20D0, 0x20F0))))) for _ in range(8)]
    return "".join(draw.choice(bases) + "".join(draw.choices(marks, k=draw.randint(0, 4))) for _ in range(40))


def _bytes(draw: random.Random) -> str:
    return draw.randbytes(draw.randint(1, 200)).decode("utf-8", errors=draw.choice(("replace", "ignore")))


def _digits(draw: random.Random) -> str:
    return "".join(draw.choices("0123456789.,-+eE $%/:\u0660\u0967\u00b2\u2167", k=draw.randint(1, 120)))
