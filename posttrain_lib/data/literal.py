"""Words that spell a control token, encoded as ordinary text.

A second tokenizer is made of the first: the same, except that its markers (special tokens and others that mean
something to a model, ``ChatTokenizer.markers``) are spelled with private-use characters. A text in which the template's
control tokens are spelled that way, and those of the row's words as they are, becomes what the tokenizer would make of
it if nobody had given those words a meaning: the pre-tokeniser and the merges see the words in their place, and no
control id can come out of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.engines import Encoded
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.errors import DataError

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.data.rendering import Document

#: A marker's number behind these: its name in the second tokenizer, and what stands for it in a row's words
#: while a template renders them. Planes 15 and 16 are private use, and turns.py's characters are in neither.
_CODES, _STAND_INS = 0x100000, 0xF0000
_MOST = 0xFFF0
_PRIVATE = re.compile(f"[{chr(_STAND_INS)}-{chr(_CODES + _MOST)}]")
#: a stand-in as Python's or JSON's escapes spell it
_ESCAPED = re.compile(r"\\U000f[0-9a-f]{4}|\\udb[89ab][0-9a-f]\\ud[c-f][0-9a-f]{2}", re.IGNORECASE)


class Literal:
    """The second tokenizer of one tokenizer.

    Raises:
        DataError: it cannot be made with the same ids.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        from tokenizers import Tokenizer

        content = json.loads(tokenizer.to_json())
        markers = tokenizer.markers
        ids = {token["content"]: token["id"] for token in content["added_tokens"] if token["content"] in markers}
        names = dict(zip(ids, map(chr, range(_CODES, _CODES + _MOST)), strict=False))
        self._encoder = Tokenizer.from_str(json.dumps(_respelled(content, names)))
        wrong = [name for name, index in ids.items() if self._encoder.token_to_id(names.get(name, "")) != index]
        if wrong:
            raise DataError(
                "words that spell control tokens cannot be encoded as text with this tokenizer",
                where="data.control_tokens",
                got=f"other ids for {', '.join(wrong[:5])}",
                expected="a tokenizer that keeps its ids when its control tokens are spelled otherwise",
                fix="set data.control_tokens to refuse, which quarantines such rows",
            )
        stand_ins = {name: chr(_STAND_INS + number) for number, name in enumerate(ids)}
        self._stand_ins = stand_ins
        self._spelt = {**names, **{stand_in: name for name, stand_in in stand_ins.items()}}
        longest_first = sorted(self._spelt, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)))

    def hide(self, words: str, control: re.Pattern[str] | None) -> str:
        """The words with a stand-in for each control token that they spell: for what ``control`` finds, markers all.

        Raises:
            RefusedRow: they hold characters that stand for something here.
        """
        if _PRIVATE.search(words):
            raise RefusedRow("private_characters", "the text holds characters of the private planes 15 and 16")
        return control.sub(lambda found: self._stand_ins[found.group()], words) if control else words

    def encode(self, text: str) -> Encoded:
        """Ids of a text in the second tokenizer's spelling, with the characters of that text they stand for."""
        found = self._encoder.encode(text, add_special_tokens=False)
        offsets = np.asarray(found.offsets, dtype=np.int64).reshape(-1, 2)
        return Encoded(np.asarray(found.ids, dtype=np.int64), offsets[:, 0], offsets[:, 1])

    def plain(self, text: str) -> Encoded:
        """Ids of a text that is all of it words of the row.

        Raises:
            RefusedRow: it holds characters that stand for something here.
        """
        if _PRIVATE.search(text):
            raise RefusedRow("private_characters", "the text holds characters of the private planes 15 and 16")
        return self.encode(text)

    def respelled(self, document: Document) -> Document:
        """A document with stand-ins in the second tokenizer's spelling: text, spans and parts.

        Raises:
            RefusedRow: the template escaped a stand-in, or an answer starts or ends inside a control token.
        """
        if escaped := _ESCAPED.search(document.text):
            raise RefusedRow("template_alters_words", f"the template prints a character as {escaped.group()}")
        found = list(self._any.finditer(document.text))
        begins = [match.start() for match in found]
        ends = [match.end() for match in found]
        grown = [0, *accumulate(len(self._spelt[match.group()]) - len(match.group()) for match in found)]

        def moved(place: int) -> int:
            before = bisect_right(ends, place)
            # A message's part may end within one: where two renderings differ first, as <|end|> and <|return|> do.
            inside = before < len(found) and begins[before] < place
            return (begins[before] if inside else place) + grown[before]

        for span in document.spans:
            if any(
                begin < place < end for place in (span.start, span.end) for begin, end in zip(begins, ends, strict=True)
            ):
                raise RefusedRow("boundary_inside_token", "an answer starts or ends inside a control token")
        return dataclasses.replace(
            document,
            text=self._any.sub(lambda match: self._spelt[match.group()], document.text),
            spans=tuple(
                dataclasses.replace(span, start=moved(span.start), end=moved(span.end)) for span in document.spans
            ),
            parts=tuple((moved(end), role) for end, role in document.parts),
        )


@cache
def literal(tokenizer: ChatTokenizer) -> Literal:
    """The second tokenizer, made once: reading a vocabulary takes seconds."""
    return Literal(tokenizer)


def _respelled(content: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A ``tokenizer.json`` with the markers under other names."""
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:  # a unigram model lists [piece, score]
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return content
