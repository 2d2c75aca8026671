"""A row as it is shown: what it says, how its tokens are spelt, and the packed row of training that it lies in."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.assemble import segments_of
from posttrain_lib.data.packing import Rows
from posttrain_lib.data.planner import Planner
from posttrain_lib.data.store_feed import StoreFeed, feed_for
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.schema.examples import Message, ParsedRow, PlainText, PreferencePair, TokenRow

if TYPE_CHECKING:
    from posttrain_lib.config.train import TrainConfig
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

#: a row's own id, with its number, within that of one of its documents, which has a suffix (#turn3, #part0, #chosen)
OWN_ID = re.compile(r"(.*:(\d+))(?:#.*)?", re.DOTALL)
#: tokens that may share one character: UTF-8 has at most four bytes
_TOKENS_OF_A_CHARACTER = 4
#: packed units after which the search ends in a mixture, which may never draw what is looked for: about 20 seconds
_MOST_MIXED = 500_000


@dataclass(frozen=True)
class Said:
    """Something that the row says: a message, or another text of it. ``notes`` are (name, text) of all else in it."""

    role: str
    text: str
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin`` to ``end`` and their text: one token, or several where a character is cut among them."""

    begin: int
    end: int
    text: str


@dataclass(frozen=True)
class PackedDocument:
    """A document in a packed row: ``tokens`` of it from slot ``begin`` on, behind ``shared`` that lie there already."""

    example: int
    name: str
    begin: int
    tokens: int
    shared: int


@dataclass(frozen=True)
class Pack:
    """Row ``row`` (from 1) of the ``rows`` of optimiser step ``step``, as planned: before ranks share the rows out."""

    step: int
    row: int
    rows: int
    row_tokens: int
    documents: tuple[PackedDocument, ...]

    @property
    def used(self) -> int:
        """Slots that hold a token."""
        return sum(document.tokens for document in self.documents)


@dataclass(frozen=True)
class ShownDocument:
    """One document. ids int32 [S]; weights float32 [S], 0 for the first token, which nothing predicts.

    ``special`` bool [S] marks control tokens; ``roles`` has a role per token, or is empty where it is not known.
    ``pack`` is where training meets it first; where that is None, ``pack_note`` says why.
    """

    example: int
    row_id: str
    ids: np.ndarray
    weights: np.ndarray
    special: np.ndarray
    pieces: tuple[Piece, ...]
    shared: int
    roles: tuple[str, ...] = ()
    pack: Pack | None = None
    pack_note: str = ""

    @property
    def trained(self) -> int:
        """Tokens of a weight above 0."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True)
class ShownRow:
    """A row and what became of it. ``refusals`` are (id, reason, detail) of what was refused: the row, or parts."""

    source: str
    row_id: str
    split: str
    kind: str
    raw: Any
    said: tuple[Said, ...]
    documents: tuple[ShownDocument, ...] = ()
    refusals: tuple[tuple[str, str, str], ...] = ()
    warnings: tuple[str, ...] = ()


def own_id(row_id: str) -> str:
    """The id of the row that a document's id belongs to."""
    match = OWN_ID.fullmatch(row_id)
    return match.group(1) if match else row_id


def said_in(row: ParsedRow) -> tuple[Said, ...]:
    """What a row says, in its order, whatever its format."""
    if isinstance(row, PlainText):
        return (Said("text", row.text),)
    if isinstance(row, TokenRow):
        return (Said("tokens", f"{len(row.token_ids):,} token ids, given by the row"),)
    tools = (Said("tools", json.dumps(list(row.tools), indent=1, ensure_ascii=False)),) if row.tools else ()
    if isinstance(row, PreferencePair):
        answers = [("chosen", message) for message in row.chosen] + [("rejected", message) for message in row.rejected]
        prompt = tuple(_said(message) for message in row.prompt)
        return (*tools, *prompt, *(_said(message, answer) for answer, message in answers))
    return (*tools, *(_said(message) for message in row.messages))


def as_text(raw: Any) -> str:
    """A row as it stands in its file: JSON, or the text of a row that could not be read."""
    return raw if isinstance(raw, str) else json.dumps(raw, indent=1, ensure_ascii=False, default=str)


def spell(tokenizer: ChatTokenizer, ids: Sequence[int]) -> tuple[Piece, ...]:
    """The text of every token as it stands in the document; of several at once where a character is cut among them.

    A token by itself may lose the space before it (SentencePiece), so each is decoded behind the one before it.
    """
    pieces: list[Piece] = []
    before: list[int] = []
    begin = 0
    while begin < len(ids):
        end = begin + 1
        text = first = _text_behind(tokenizer, before, ids[begin:end])
        while "\ufffd" in text and end < min(len(ids), begin + _TOKENS_OF_A_CHARACTER):
            end += 1
            text = _text_behind(tokenizer, before, ids[begin:end])
        if "\ufffd" in text:  # no character comes of it: a byte that stands alone
            end, text = begin + 1, first
        pieces.append(Piece(begin, end, text))
        before, begin = list(ids[begin:end]), end
    return tuple(pieces)


def visible(text: str, *, lines: bool = True) -> str:
    """Text in which nothing hides and nothing acts on a terminal or a page: control and format characters are spelt.

    ``lines`` marks line ends; they break the line either way.
    """
    shown = "".join(_visible(character) for character in text)
    shown = shown.replace("\n", "↵\n") if lines else shown
    return shown.replace(" ", "·") if shown.strip(" ") == "" else shown


def locate(store: TokenStore, train: TrainConfig, wanted: set[int]) -> tuple[dict[int, Pack], str]:
    """Where training first meets examples: example -> packed row. And why those are missing that are.

    Walks the plan of the run on lengths alone, from its first step on, until all are found: within the first pass
    over the data, save in a mixture.

    Raises:
        DataError, ConfigError: as a StoreFeed raises them: the run could not start either.
    """
    feed = feed_for(store, train)
    planner = Planner(feed, row_tokens=train.row_tokens, packing_buffer=train.packing_buffer)
    unit_of = {example: int(np.searchsorted(feed.units.first, example, side="right")) - 1 for example in wanted}
    missing, found, step, packed = set(unit_of.values()), dict[int, Pack](), 0, 0
    most = None if train.mixture is None else _MOST_MIXED
    while missing and (train.steps is None or step < train.steps) and (most is None or packed < most):
        rows = planner.rows(train.rows_per_step, step + 1)
        if len(rows) == 0:
            break
        step += 1
        packed += len(rows.units)
        for number, row in enumerate(rows, 1):
            if hit := missing.intersection(row):
                pack = _pack(store, feed, row, train.row_tokens, (step, number, len(rows)))
                found.update(dict.fromkeys(hit, pack))
                missing -= hit
    packs = {example: found[unit] for example, unit in unit_of.items() if unit in found}
    return packs, f"not in the first {step:,} steps of the run ({packed:,} packed units)" if missing else ""


def described(document: ShownDocument) -> str:
    """Counts of a document: tokens, trained ones, their weights, and what it shares with the one before it."""
    trained, total = document.trained, len(document.ids)
    values, counts = np.unique(document.weights[document.weights > 0], return_counts=True)
    weights = ", ".join(f"{value:g} x {count:,}" for value, count in zip(values.tolist(), counts.tolist(), strict=True))
    shared = f"; shares its first {document.shared:,} with the document before" if document.shared else ""
    weighed = f", weights {weights}" if weights else ""
    return f"{total:,} tokens, {trained:,} trained ({trained / total:.0%}){weighed}{shared}"


def weight_of(document: ShownDocument, piece: Piece) -> float:
    """The weight of a piece's tokens."""
    return float(document.weights[piece.begin : piece.end].max())


def pack_line(pack: Pack, document: ShownDocument, steps: int | None) -> str:
    """In words where a document lies."""
    own = next(item for item in pack.documents if item.example == document.example)
    behind = f" behind {own.shared:,} shared ones" if own.shared else ""
    return (
        f"packed in step {pack.step:,}{f' of {steps:,}' if steps else ''}, row {pack.row} of {pack.rows}: "
        f"slots {own.begin:,} to {own.begin + own.tokens - 1:,} of {pack.row_tokens:,}{behind}; "
        f"its {len(pack.documents)} document(s) fill {pack.used:,} slots ({pack.used / pack.row_tokens:.2%})"
    )


def _pack(store: TokenStore, feed: StoreFeed, row: Sequence[int], row_tokens: int, at: tuple[int, int, int]) -> Pack:
    segments = segments_of(store, feed.units, Rows.of([row]))
    begins = np.cumsum(segments.lengths, dtype=np.int64) - segments.lengths
    columns = (segments.examples, begins, segments.lengths, segments.firsts)
    documents = tuple(
        PackedDocument(example, feed.name_example(example), begin, tokens, shared)
        for example, begin, tokens, shared in zip(*(column.tolist() for column in columns), strict=True)
    )
    return Pack(*at, row_tokens, documents)


def _said(message: Message, answer: str = "") -> Said:
    notes = [("answer", answer)] if answer else []
    if message.reasoning_content:
        notes.append(("reasoning", message.reasoning_content))
    notes += [("tool call", json.dumps(call, ensure_ascii=False)) for call in message.tool_calls]
    notes += [(name, str(value)) for name in ("train", "weight") if (value := getattr(message, name)) is not None]
    notes += [(name, json.dumps(value, ensure_ascii=False, default=str)) for name, value in message.extra.items()]
    return Said(message.role, message.content or "", tuple(notes))


def _text_behind(tokenizer: ChatTokenizer, before: list[int], ids: Sequence[int]) -> str:
    alone = tokenizer.decode(before, skip_special_tokens=False)
    together = tokenizer.decode([*before, *ids], skip_special_tokens=False)
    if together.startswith(alone):
        return together[len(alone) :]
    return tokenizer.decode(ids, skip_special_tokens=False)


def _visible(character: str) -> str:
    if character in " \n\u3000":
        return character
    if character == "\t":
        return "⇥"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
        return f"⟦U+{ord(character):04X}⟧"
    return character
