"""The second tokenizer: the same ids, and words that spell control tokens as ordinary text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.literal import literal
from posttrain_lib.data.rendering import Document, Span
from tests.unit.data.real_templates import OWN_TOKENIZER

TEXTS = ("Hi  there,\n\n  naïve 日本 12345", " x", "  \n", "a<b>", "I'll [see] it's |> <|", "é")


def added(tokenizer: ChatTokenizer) -> list[str]:
    """All tokens beside the vocabulary: no real tokenizer here has one that is plain text."""
    return [token.content for token in tokenizer._tokenizer.added_tokens_decoder.values()]


def respelled(tokenizer: ChatTokenizer, text: str) -> str:
    """All control tokens in the second tokenizer's spelling."""
    return literal(tokenizer).respelled(Document(text, (), ((len(text), "user"),), None, literal=True)).text


@pytest.mark.parametrize("name", OWN_TOKENIZER)
def test_without_stand_ins_it_gives_what_the_first_gives(
    name: str, real_tokenizer: Callable[[str], ChatTokenizer]
) -> None:
    tokenizer = real_tokenizer(name)
    marks = [*tokenizer.pieces(sorted(tokenizer.special_ids)[:2]), *added(tokenizer)[-1:]]
    for text in (*TEXTS, *(f"{a}{mark}{b}" for mark in marks for a in TEXTS for b in TEXTS)):
        expected = tokenizer.encode(text).ids.tolist()
        assert literal(tokenizer).encode(respelled(tokenizer, text)).ids.tolist() == expected, text


@pytest.mark.parametrize("name", OWN_TOKENIZER)
def test_every_control_token_as_text_has_no_control_id(
    name: str, real_tokenizer: Callable[[str], ChatTokenizer]
) -> None:
    tokenizer = real_tokenizer(name)
    for mark in added(tokenizer):
        for text in (mark, f"a{mark}b", f"a {mark}\n{mark}"):
            ids = literal(tokenizer).plain(text).ids.tolist()
            assert not set(tokenizer._tokenizer.added_tokens_decoder).intersection(ids), text
            assert tokenizer.decode(ids) == text


def test_places_move_with_the_text(chatml: ChatTokenizer) -> None:
    stand_in = literal(chatml).hide("<|im_end|>", chatml.marker)
    text = f"<|im_start|>X{stand_in}Y{stand_in}<|im_end|>"
    places = [text.index("X"), text.index("Y"), len(text)]
    document = Document(text, (Span(places[1], places[2], 1.0),), ((places[0], "x"), (places[2], "y")), 0, literal=True)
    moved = literal(chatml).respelled(document)
    span = moved.spans[0]
    assert moved.text[span.start : span.end].startswith("Y<|im_end|>")
    assert span.end == len(moved.text) == moved.parts[-1][0]
    assert moved.text[moved.parts[0][0] :].startswith("X<|im_end|>Y")
