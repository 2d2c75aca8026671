"""From a document of text to token ids with loss weights, aligned with the predicted token."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from posttrain_lib.data.engines import Encoded
from posttrain_lib.data.literal import literal
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import Document, Span

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Tokens:
    """A document as ids int32 [S] with weights float32 [S] (0 = not trained).

    ``roles[role_of[t]]`` is the role of the message that token t belongs to (``role_of`` int64 [S]). ``answers`` are
    (first token, token behind the last) of each trained span. ``resplit`` says that prompts and answers, encoded apart
    as serving and the model do, give other tokens than the whole text.
    """

    ids: np.ndarray
    weights: np.ndarray
    roles: tuple[str, ...]
    role_of: np.ndarray
    answers: tuple[tuple[int, int], ...]
    resplit: bool

    @property
    def by_role(self) -> Counter[str]:
        """Tokens per role."""
        return _count(self.role_of, self.roles)

    @property
    def trained_by_role(self) -> Counter[str]:
        """Tokens of a weight above 0 per role."""
        return _count(self.role_of[self.weights > 0], self.roles)

    def cut(self, begin: int, end: int) -> Tokens:
        """Tokens ``begin`` to ``end``, as a document of their own: its first token is predicted from nothing."""
        end = min(end, len(self.ids))
        weights = self.weights[begin:end].copy()
        weights[:1] = 0.0
        answers = [(max(first, begin) - begin, min(last, end) - begin) for first, last in self.answers]
        return dataclasses.replace(
            self,
            ids=self.ids[begin:end],
            weights=weights,
            role_of=self.role_of[begin:end],
            answers=tuple((first, last) for first, last in answers if first < last),
        )


def tokenize(tokenizer: ChatTokenizer, document: Document) -> Tokens:
    """Encode, and weigh the tokens of the document's spans.

    The text is cut where its answers start. Serving cuts only before the answer it asks for, and encodes those before
    as part of the prompt: a document of several answers that is ``resplit`` has to be made turn by turn.

    Raises:
        RefusedRow: a token runs across the start of an answer and cannot be split, or an answer has no token.
    """
    encode = tokenizer.encode
    if document.literal:
        document, encode = literal(tokenizer).respelled(document), literal(tokenizer).encode
    starts = [span.start for span in document.spans]
    if document.as_history:
        starts = starts[-1:]
    encoded, resplit = _encode(tokenizer, encode, document.text, starts)
    weights = np.zeros(len(encoded.ids), np.float32)
    ends = np.array([end for end, _ in document.parts])
    role_of = np.minimum(np.searchsorted(ends, encoded.begins, side="right"), len(ends) - 1)
    roles = (*(role for _, role in document.parts), "assistant")
    answers = []
    for span in document.spans:
        chosen = np.flatnonzero(_tokens_of(encoded, span))
        if len(chosen) == 0:
            raise RefusedRow("answer_without_tokens", f"characters {span.start} to {span.end} hold no token")
        weights[chosen] = span.weight
        role_of[chosen] = len(roles) - 1
        answers.append((int(chosen[0]), int(chosen[-1]) + 1))
    return Tokens(encoded.ids.astype(np.int32), weights, roles, role_of, tuple(answers), resplit)


def _tokens_of(encoded: Encoded, span: Span) -> np.ndarray:
    """bool [S]: tokens that begin within the span. A marker may take white space behind the span with it."""
    return (encoded.begins >= span.start) & (encoded.begins < span.end) & (encoded.ends > encoded.begins)


def _encode(
    tokenizer: ChatTokenizer, encode: Callable[[str], Encoded], text: str, cuts: Sequence[int]
) -> tuple[Encoded, bool]:
    """The text encoded as serving and the model make it: cut at the starts of answers.

    Mostly that gives what the whole text gives. Where it does not, a token ran across a cut or white space before it
    was grouped otherwise; the pieces are then the truth, and the second result is True.
    """
    together = encode(text)
    if not cuts:
        return together, False
    bounds = [0, *cuts, len(text)]
    pieces = [(begin, encode(text[begin:end])) for begin, end in pairwise(bounds) if begin < end]
    ids = np.concatenate([piece.ids for _, piece in pieces])
    if np.array_equal(ids, together.ids):
        return together, False
    # Some tokenizers put a space before every text that they encode: then the pieces do not add up to the whole.
    spelt = [tokenizer.decode(found.tolist(), skip_special_tokens=False) for found in (ids, together.ids)]
    if spelt[0] == spelt[1]:
        begins = np.concatenate([begin + piece.begins for begin, piece in pieces])
        ends = np.concatenate([begin + piece.ends for begin, piece in pieces])
        return Encoded(ids, begins, ends), True
    if any(((together.begins < cut) & (together.ends > cut)).any() for cut in cuts):
        raise RefusedRow("boundary_inside_token", "a token runs across the start of an answer and cannot be split")
    return together, False


def _count(part: np.ndarray, roles: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for index, number in zip(*np.unique(part, return_counts=True), strict=True):
        counts[roles[int(index)]] += int(number)
    return counts
