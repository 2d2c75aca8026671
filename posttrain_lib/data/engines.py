"""What turns text into token ids: the ``tokenizers`` library as the reference, and a faster reader of the same file.

The fast engine gives ids; where each token stands in the text follows from how much text each id spells. Where that
does not add up (the text was normalised, a character has two spellings), the reference reads that text instead, and
the text is counted. Nothing here is believed: posttrain_lib/data/engine_gate.py compares the two before use.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

#: characters after which the fast reader is made anew: it remembers every word that it ever read (6 bytes of memory per
#: byte of random letters), and nothing else empties that memory
RENEW_AFTER = 256_000_000
#: what ``\s`` means to the library that strips around added tokens (Unicode's White_Space), in UTF-8
_SPACE = rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)*"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids int64 [S] of a text, and where in it (character from, character to) each token stands, int64 [S]."""

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class Unsupported(Exception):
    """This engine cannot read this tokenizer; the text says why."""


class Engine(Protocol):
    """Encodes exactly the text it is given: nothing is added before or behind, markers in it become their tokens."""

    name: str
    version: str

    def encode(self, text: str) -> np.ndarray:
        """Ids int64 [S]."""
        ...

    def encode_with_offsets(self, text: str) -> Encoded:
        """Ids, and the characters that each token stands for."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Ids int64 of each text, in their order."""
        ...


class HfEngine:
    """The reference: a ``transformers`` tokenizer of the fast kind."""

    name = "tokenizers"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.version = importlib.metadata.version("tokenizers")

    def encode(self, text: str) -> np.ndarray:
        """Ids int64 [S]."""
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def encode_with_offsets(self, text: str) -> Encoded:
        """Ids, and the characters that each token stands for."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return Encoded(np.asarray(found["input_ids"], dtype=np.int64), offsets[:, 0], offsets[:, 1])

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """``threads`` has no say here: the environment variable TOKENIZERS_PARALLELISM has."""
        found = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [np.asarray(ids, dtype=np.int64) for ids in found]


class GigatokenEngine:
    """The gigatoken library, given what ``transformers`` made of the tokenizer's files, without its normaliser.

    Two libraries have tables of two versions of Unicode, so only text that is normal already is given to the fast one;
    other text goes to the reference.

    Args:
        tokenizer: a ``transformers`` tokenizer of the fast kind.
        content: what its backend writes of itself, where that is at hand (it takes a while for large vocabularies).

    Raises:
        Unsupported: the library is not there or does not read this tokenizer, or no rule says how much text an id
            spells.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Any, content: str | None = None) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise Unsupported(f"gigatoken is not installed: {error}") from error
        self.version = self.installed_version()
        backend = tokenizer.backend_tokenizer
        if getattr(backend.model, "dropout", None):
            raise Unsupported("its merges are left out at random (dropout)")
        self._normal_form, content = _without_normaliser(backend, content or backend.to_str())
        self._spelling = Spelling(backend)
        self._content = content.encode()
        self._make: Callable[[bytes], Any] = gigatoken.Tokenizer.from_json
        try:
            self._tokenizer = self._make(self._content)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise Unsupported(f"gigatoken does not read this tokenizer: {error}") from error
        self._characters_left = RENEW_AFTER
        self._reference = HfEngine(tokenizer)
        #: texts that the reference read instead, by why
        self.fallbacks: Counter[str] = Counter()

    @classmethod
    def installed_version(cls) -> str:
        """Version of the library; empty where it is not installed."""
        try:
            return importlib.metadata.version(cls.name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def encode(self, text: str) -> np.ndarray:
        """Ids int64 [S]."""
        raw, reason = self._raw(text)
        if reason:
            self.fallbacks[reason] += 1
            return self._reference.encode(text)
        return self._read(raw)

    def encode_with_offsets(self, text: str) -> Encoded:
        """Ids, and the characters that each token stands for."""
        raw, reason = self._raw(text)
        if not reason:
            ids = self._read(raw)
            offsets = self._spelling.offsets(ids, text, raw)
            if offsets is not None:
                return Encoded(ids, *offsets)
        self.fallbacks[reason or "offsets"] += 1
        return self._reference.encode_with_offsets(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Ids int64 of each text, in their order. The library lets other threads run while it reads a text."""
        if threads <= 1:
            return [self.encode(text) for text in texts]
        size = -(-len(texts) // (4 * threads)) or 1
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for part in pool.map(self.encode_batch, parts) for ids in part]

    def _read(self, raw: str | bytes) -> np.ndarray:
        """Ids int64 [S]."""
        self._characters_left -= len(raw)
        if self._characters_left < 0:
            self._characters_left = RENEW_AFTER
            self._tokenizer = self._make(self._content)
        ids: np.ndarray = self._tokenizer.encode(raw)
        return ids.astype(np.int64)

    def _raw(self, text: str) -> tuple[str | bytes, str]:
        """What the library is given: ASCII as it is, other text in UTF-8. Or why it is given nothing."""
        if text.isascii():
            return text, ""
        if self._normal_form and not unicodedata.is_normalized(self._normal_form, text):  # type: ignore[arg-type]
            return b"", "normalised"
        try:
            return text.encode(), ""
        except UnicodeEncodeError:  # half a surrogate pair: the reference refuses it in its own words
            return b"", "surrogates"


class Spelling:
    """How many bytes of text each id spells, and so where tokens stand.

    Two kinds of vocabulary are known: byte-level (GPT-2: one character of the token per byte) and SentencePiece-like
    (a meta symbol for the space, ``<0x..>`` for bytes of characters that the vocabulary lacks).

    Raises:
        Unsupported: neither kind.
    """

    def __init__(self, backend: Any) -> None:
        decoder = backend.decoder.__getstate__().decode() if backend.decoder is not None else ""
        byte_level = '"type":"ByteLevel"' in decoder
        if not byte_level and '"type":"ByteFallback"' not in decoder:
            raise Unsupported("neither a byte-level vocabulary nor one with a token for every byte")
        #: the symbol for a space, which some tokenizers put before the text
        space = "\u0120" if byte_level else "\u2581"
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        size = 1 + max(vocabulary.values(), default=0)
        self._widths = np.zeros(size, np.int64)
        self._widths[list(vocabulary.values())] = list(map(len if byte_level else _width, vocabulary))
        self._with_space = bytearray(size)
        for token, index in vocabulary.items():
            self._with_space[index] = token.startswith(space)
        for index, token in added.items():
            self._widths[index] = len(token.content.encode())
            self._with_space[index] = False
        self._added = {index: _pattern(token) for index, token in added.items()}
        self._is_added = np.zeros(size, bool)
        self._is_added[list(added)] = True
        self._strips = any(token.lstrip or token.rstrip for token in added.values())

    def offsets(self, ids: np.ndarray, text: str, raw: str | bytes) -> tuple[np.ndarray, np.ndarray] | None:
        """Characters from and to of each id, int64 [S] each; None where they do not add up to the text.

        Args:
            ids: int64 [S].
            text: what they were made from.
            raw: the same in UTF-8, or as it is where it is ASCII.
        """
        if len(ids) == 0:
            return None if text else (ids, ids)
        widths = self._widths.take(ids)
        if self._with_space[ids[0]] and text[0] != " ":
            widths[0] -= 1
        if self._strips and not self._take_space(ids, widths, raw if isinstance(raw, bytes) else raw.encode()):
            return None
        ends = widths.cumsum()
        if ends[-1] != len(raw):
            return None
        begins = ends - widths
        if isinstance(raw, bytes):
            begins, ends = _characters(raw, begins, ends)
        if widths[0] == 0:  # a space put before the text is said to stand for its first character
            ends[0] = 1
        return begins, ends

    def _take_space(self, ids: np.ndarray, widths: np.ndarray, raw: bytes) -> bool:
        """Widen ``widths`` by the white space that added tokens took with them; whether each token is where it says."""
        extra = 0
        places = self._is_added.take(ids).nonzero()[0]
        if len(places) == 0:
            return True
        starts = widths.cumsum() - widths
        for place in places.tolist():
            token = self._added[int(ids[place])]
            start = int(starts[place]) + extra
            found = token.match(raw, start)
            if found is None:
                return False
            taken = found.end() - start - int(widths[place])
            widths[place] += taken
            extra += taken
        return True


def _without_normaliser(backend: Any, content: str) -> tuple[str, str]:
    """The normal form that the tokenizer puts text in ("" for none), and its file's content without that step."""
    if backend.normalizer is None:
        return "", content
    step = backend.normalizer.__getstate__().decode()
    form = json.loads(step).get("type", "")
    if form not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise Unsupported(f"no rule for its normaliser {step[:80]}")
    named = f'"normalizer":{step}'
    if content.count(named) != 1:
        raise Unsupported("its normaliser is not found in what the tokenizer writes of itself")
    return form, content.replace(named, '"normalizer":null')


def _pattern(token: Any) -> re.Pattern[bytes]:
    """What an added token takes of the text."""
    content = re.escape(token.content.encode())
    return re.compile((_SPACE if token.lstrip else b"") + content + (_SPACE if token.rstrip else b""))


def _width(token: str) -> int:
    """Bytes that a SentencePiece-like token spells: its meta symbol stands for a space."""
    return 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace("\u2581", " ").encode())


def _characters(raw: bytes, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Byte positions as character positions; a token of a part of a character stands for all of it."""
    leads = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80
    character = np.cumsum(leads)
    return character[np.minimum(begins, len(raw) - 1)] - 1, character[ends - 1]
