"""From a document of text to token ids with loss weights, aligned with the predicted token."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posttrain_lib.data.chat_tokenizer import Encoded
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import Document, Span

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Tokens:
    """A document as ids int32 [S] with weights float32 [S] (0 = not trained).

    ``roles[role_of[t]]`` is the role of the message that token t belongs to (``role_of`` int64 [S]). ``resplit`` says
    that a token would have run across the start of an answer, so that prompt and answer were encoded apart, as
    serving and the model do.
    """

    ids: np.ndarray
    weights: np.ndarray
    roles: tuple[str, ...]
    role_of: np.ndarray
    resplit: bool

    @property
    def by_role(self) -> Counter[str]:
        """Tokens per role."""
        return _count(self.role_of, self.roles)

    @property
    def trained_by_role(self) -> Counter[str]:
        """Tokens of a weight above 0 per role."""
        return _count(self.role_of[self.weights > 0], self.roles)

    def truncated(self, length: int) -> Tokens:
        """The first ``length`` tokens."""
        return Tokens(self.ids[:length], self.weights[:length], self.roles, self.role_of[:length], self.resplit)


def tokenize(tokenizer: ChatTokenizer, document: Document) -> Tokens:
    """Encode, and weigh the tokens of the document's spans.

    Raises:
        RefusedRow: a token runs across the start of an answer and cannot be split, or an answer has no token.
    """
    starts = [span.start for span in document.spans]
    encoded = tokenizer.encode(document.text)
    resplit = any(_inside_a_token(encoded, start) for start in starts)
    if resplit:
        encoded = _encode_apart(tokenizer, document.text, starts, encoded)
    weights = np.zeros(len(encoded.ids), np.float32)
    for span in document.spans:
        chosen = _tokens_of(encoded, span)
        if not chosen.any():
            raise RefusedRow("answer_without_tokens", f"characters {span.start} to {span.end} hold no token")
        weights[chosen] = span.weight
    ends = np.array([end for end, _ in document.parts])
    part = np.minimum(np.searchsorted(ends, encoded.begins, side="right"), len(ends) - 1)
    roles = tuple(role for _, role in document.parts)
    return Tokens(encoded.ids.astype(np.int32), weights, roles, part, resplit)


def _tokens_of(encoded: Encoded, span: Span) -> np.ndarray:
    """bool [S]: tokens that begin within the span. A marker may take white space behind the span with it."""
    return (encoded.begins >= span.start) & (encoded.begins < span.end) & (encoded.ends > encoded.begins)


def _inside_a_token(encoded: Encoded, place: int) -> bool:
    return bool(((encoded.begins < place) & (encoded.ends > place)).any())


def _encode_apart(tokenizer: ChatTokenizer, text: str, cuts: Sequence[int], together: Encoded) -> Encoded:
    bounds = [0, *cuts, len(text)]
    pieces = [(begin, tokenizer.encode(text[begin:end])) for begin, end in itertools.pairwise(bounds) if begin < end]
    ids = np.concatenate([piece.ids for _, piece in pieces])
    # Some tokenizers put a space before every text that they encode: then the pieces do not add up to the whole.
    if tokenizer.decode(ids.tolist(), skip_special_tokens=False) != tokenizer.decode(
        together.ids.tolist(), skip_special_tokens=False
    ):
        raise RefusedRow("boundary_inside_token", "a token runs across the start of an answer and cannot be split")
    return Encoded(
        ids,
        np.concatenate([begin + piece.begins for begin, piece in pieces]),
        np.concatenate([begin + piece.ends for begin, piece in pieces]),
    )


def _count(part: np.ndarray, roles: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for index, number in zip(*np.unique(part, return_counts=True), strict=True):
        counts[roles[int(index)]] += int(number)
    return counts
