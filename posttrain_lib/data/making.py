"""From a parsed row to documents of tokens: what a row becomes, and what of it is left out and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from posttrain_lib.data.control_tokens import spells_control_token
from posttrain_lib.data.literal import literal
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.rendering import Document, Rendered, render_conversation, render_prompt
from posttrain_lib.data.tokenize import Tokens, tokenize
from posttrain_lib.schema.examples import Conversation, Message, ParsedRow, PlainText, PreferencePair, Prompt, TokenRow

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer
    from posttrain_lib.data.engines import Encoded

CHOSEN, REJECTED = "#chosen", "#rejected"
Kind = Literal["documents", "pair", "prompt"]


class Settings(Protocol):
    """What decides the documents of a row; a DataConfig has them."""

    @property
    def trained_turns(self) -> str:
        """each, last or as_rendered."""
        ...

    @property
    def train_on(self) -> str:
        """all, last, without_tools or flagged."""
        ...

    @property
    def control_tokens(self) -> str:
        """refuse or as_text."""
        ...

    @property
    def max_example_tokens(self) -> int:
        """The longest document, and the longest pair (both answers with their prompts)."""
        ...

    @property
    def over_length(self) -> str:
        """refuse, truncate_right, truncate_left or split."""
        ...


@dataclass(frozen=True)
class MadeDocument:
    """A document of a row.

    ``suffix`` behind the row's id tells the documents of a row apart. ``last_turn`` is the index of the last trained
    message; None where nothing is trained or the row has no messages. ``truncated``: it is not the whole document.
    ``closed``: the template ends each of its answers with a marker, whether or not that was cut off.
    """

    tokens: Tokens
    suffix: str = ""
    last_turn: int | None = None
    truncated: bool = False
    closed: bool = True


@dataclass(frozen=True)
class Made:
    """What a row became. ``left_out`` are (suffix, why) of documents that cannot be used beside those that can.

    A ``pair`` has exactly two documents, the chosen answer first; a ``prompt`` has one, of weight 0. ``notes`` count
    what the receipt should mention. ``read_tokens`` are those of the row before anything was cut or left out: they are
    the tokens of ``documents``, those in ``left_out_tokens`` and the note ``truncated_tokens`` together. ``margin`` is
    that of :class:`~posttrain_lib.schema.examples.PreferencePair`.
    """

    kind: Kind
    documents: tuple[MadeDocument, ...]
    left_out: tuple[tuple[str, RefusedRow], ...] = ()
    notes: Counter[str] = field(default_factory=Counter)
    read_tokens: int = 0
    left_out_tokens: int = 0
    margin: float | None = None


def make(tokenizer: ChatTokenizer, row: ParsedRow, settings: Settings) -> Made:
    """The documents of a row.

    Raises:
        RefusedRow: nothing of the row can be used. Its ``tokens`` are all of them, as far as they could be made.
    """
    if isinstance(row, Conversation):
        rendered = render_conversation(
            tokenizer, row, settings.trained_turns, settings.train_on, settings.control_tokens
        )
        notes = rendered.notes.copy()
        return _fitted(_tokenized(tokenizer, rendered, notes), settings, notes)
    if isinstance(row, PreferencePair):
        return dataclasses.replace(_pair(tokenizer, row, settings), margin=row.margin)
    if isinstance(row, Prompt):
        return _prompt(tokenizer, row, settings)
    if isinstance(row, PlainText):
        spelt = spells_control_token(tokenizer, row.text, settings.control_tokens)
        tokens = _plain(tokenizer, literal(tokenizer).plain(row.text) if spelt else tokenizer.encode(row.text))
        return _fitted([MadeDocument(tokens)], settings, Counter(control_tokens_as_text=int(spelt)))
    return _fitted([MadeDocument(_given(tokenizer, row))], settings, Counter())


def _tokenized(
    tokenizer: ChatTokenizer, rendered: Rendered, notes: Counter[str]
) -> list[MadeDocument | tuple[str, RefusedRow]]:
    """Each document made, or why it cannot be.

    Serving encodes earlier answers together with what stands before them. Where that gives other tokens than an answer
    by itself (white space at its start joins that of the header), each turn gets a document of its own.
    """
    made: list[MadeDocument | tuple[str, RefusedRow]] = []
    for document in rendered.documents:
        found = _attempted(tokenizer, document)
        if _joined(document, found):
            notes["resplit_conversations"] += 1
            made += [_attempted(tokenizer, turn) for turn in document.turn_by_turn()]
        else:
            made.append(found)
    return made


def _attempted(tokenizer: ChatTokenizer, document: Document) -> MadeDocument | tuple[str, RefusedRow]:
    try:
        return _made(tokenizer, document)
    except RefusedRow as refusal:
        return document.suffix, refusal


def _joined(document: Document, made: MadeDocument | tuple[str, RefusedRow]) -> bool:
    """Whether no one encoding of the document is what serving has for each of its turns."""
    several = len(document.spans) > 1 and not document.as_history
    return several and (made[1].reason == "boundary_inside_token" if isinstance(made, tuple) else made.tokens.resplit)


def _made(tokenizer: ChatTokenizer, document: Document) -> MadeDocument:
    closed = all(span.closed for span in document.spans)
    return MadeDocument(tokenize(tokenizer, document), document.suffix, document.last_turn, closed=closed)


def _fitted(found: Sequence[MadeDocument | tuple[str, RefusedRow]], settings: Settings, notes: Counter[str]) -> Made:
    """Every document cut to ``max_example_tokens`` as ``over_length`` says; RefusedRow where none is left."""
    documents: list[MadeDocument] = []
    left_out: list[tuple[str, RefusedRow]] = []
    notes = notes.copy()
    read = left_out_tokens = 0
    for item in found:
        if isinstance(item, tuple):
            left_out.append(item)
            continue
        whole = len(item.tokens.ids)
        read += whole
        pieces = [item] if whole <= settings.max_example_tokens else _pieces(item, settings)
        notes["truncated_tokens"] += whole - sum(len(piece.tokens.ids) for piece in pieces)
        for piece in pieces:
            problem = _useless(piece, whole, settings)
            if problem is not None:
                left_out.append((piece.suffix, problem))
                left_out_tokens += len(piece.tokens.ids)
                continue
            notes["split_parts"] += len(pieces) > 1
            documents.append(piece)
    if not documents:
        why = left_out[0][1]
        raise RefusedRow(why.reason, why.detail, read)
    return Made("documents", tuple(documents), tuple(left_out), +notes, read, left_out_tokens)


def _pieces(document: MadeDocument, settings: Settings) -> list[MadeDocument]:
    """What ``over_length`` leaves of a document that is too long; itself where it is to be refused."""
    tokens, limit, whole = document.tokens, settings.max_example_tokens, len(document.tokens.ids)
    bounds = {
        "refuse": [],
        "truncate_right": [(0, limit)],
        "truncate_left": [(whole - limit, whole)],
        "split": [(begin, min(begin + limit, whole)) for begin in range(0, whole, limit)],
    }[settings.over_length]
    if len(bounds) < 2:
        return [
            dataclasses.replace(document, tokens=tokens.cut(begin, end), truncated=True) for begin, end in bounds
        ] or [document]
    return [
        dataclasses.replace(
            document, tokens=tokens.cut(begin, end), truncated=True, suffix=f"{document.suffix}#part{number}"
        )
        for number, (begin, end) in enumerate(bounds)
    ]


def _useless(piece: MadeDocument, whole: int, settings: Settings) -> RefusedRow | None:
    """Why the piece cannot be used: still too long, or nothing in it is trained."""
    limit = settings.max_example_tokens
    if len(piece.tokens.ids) > limit:
        return _too_long(whole, settings)
    if np.count_nonzero(piece.tokens.weights[1:]):
        return None
    if piece.truncated:
        kept = f"the {len(piece.tokens.ids)} tokens that data.over_length: {settings.over_length} keeps of {whole}"
        return RefusedRow("nothing_left", f"no trained token within {kept}")
    return RefusedRow("nothing_to_train", "no token of a weight above 0 has another before it")


def _too_long(length: int, settings: Settings) -> RefusedRow:
    return RefusedRow("too_long", f"{length} tokens, data.max_example_tokens is {settings.max_example_tokens}", length)


def _pair(tokenizer: ChatTokenizer, row: PreferencePair, settings: Settings) -> Made:
    notes: Counter[str] = Counter()
    chosen, rejected = (
        _answered(tokenizer, row, answer, suffix, settings, notes)
        for answer, suffix in ((row.chosen, CHOSEN), (row.rejected, REJECTED))
    )
    first, other = chosen.tokens.answers[0][0], rejected.tokens.answers[0][0]
    if not np.array_equal(chosen.tokens.ids[:first], rejected.tokens.ids[:other]):
        raise RefusedRow("prompts_differ", "the template prints the prompt otherwise before each of the answers")
    lengths = len(chosen.tokens.ids) - first, len(rejected.tokens.ids) - first
    whole, room = 2 * first + sum(lengths), settings.max_example_tokens - 2 * first
    if sum(lengths) <= room:
        return _compared(chosen, rejected, notes, whole)
    if settings.over_length in ("refuse", "split"):  # half a pair compares nothing
        raise _too_long(whole, settings)
    most = max(room // 2, room - min(lengths))  # what a short answer does not need is the other's
    if most < 1:
        raise RefusedRow("nothing_left", f"the prompt of {first} tokens, twice, leaves no room for the answers", whole)
    notes["truncated_tokens"] += sum(max(0, length - most) for length in lengths)
    return _compared(_shortened(chosen, first + most), _shortened(rejected, first + most), notes, whole)


def _compared(chosen: MadeDocument, rejected: MadeDocument, notes: Counter[str], whole: int) -> Made:
    """The pair, of ``whole`` tokens before it was cut."""
    if np.array_equal(chosen.tokens.ids, rejected.tokens.ids):
        cut = " as far as data.max_example_tokens keeps them" if chosen.truncated else ""
        raise RefusedRow("answers_equal", f"both answers are the same tokens{cut}", whole)
    return Made("pair", (chosen, rejected), notes=+notes, read_tokens=whole)


def _answered(
    tokenizer: ChatTokenizer,
    row: PreferencePair,
    answer: Sequence[Message],
    suffix: str,
    settings: Settings,
    notes: Counter[str],
) -> MadeDocument:
    """The prompt and one of its answers, of which every assistant turn has weight 1."""
    prompt = (dataclasses.replace(message, train=False) for message in row.prompt)
    conversation = Conversation(row.source, row.row_id, (*prompt, *answer), row.tools)
    rendered = render_conversation(tokenizer, conversation, "each", control_tokens=settings.control_tokens)
    if len(rendered.documents) > 1:
        raise RefusedRow(
            "answer_rewritten", f"{suffix[1:]}: the template prints its turns otherwise when others follow"
        )
    notes.update(rendered.notes)
    made = _made(tokenizer, rendered.documents[0])
    if _joined(rendered.documents[0], made):
        raise RefusedRow(
            "answer_rewritten", f"{suffix[1:]}: the tokenizer joins the start of an earlier turn to what precedes it"
        )
    return dataclasses.replace(made, suffix=suffix)


def _shortened(document: MadeDocument, length: int) -> MadeDocument:
    if len(document.tokens.ids) <= length:
        return document
    return dataclasses.replace(document, tokens=document.tokens.cut(0, length), truncated=True)


def _prompt(tokenizer: ChatTokenizer, row: Prompt, settings: Settings) -> Made:
    rendered = render_prompt(
        tokenizer, Conversation(row.source, row.row_id, row.messages, row.tools), settings.control_tokens
    )
    document = _made(tokenizer, rendered.documents[0])
    if len(document.tokens.ids) > settings.max_example_tokens:  # a prompt that is cut asks something else
        raise _too_long(len(document.tokens.ids), settings)
    return Made("prompt", (document,), notes=rendered.notes, read_tokens=len(document.tokens.ids))


def _plain(tokenizer: ChatTokenizer, encoded: Encoded) -> Tokens:
    """The text between the tokenizer's begin (where it writes one) and end of sequence; all but the first learned."""
    if not len(encoded.ids):
        raise RefusedRow("empty_text", "the text has no token")
    before = [tokenizer.bos_id] if tokenizer.writes_bos else []
    behind = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in (before, encoded.ids, behind)])
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0.0
    return Tokens(ids, weights, ("text",), np.zeros(len(ids), np.int64), ((1, len(ids)),), False)


def _given(tokenizer: ChatTokenizer, row: TokenRow) -> Tokens:
    """The row's own ids and weights."""
    size = tokenizer.vocabulary_size
    if (largest := int(row.token_ids.max())) >= size:
        raise RefusedRow("token_out_of_range", f"token id {largest}, the tokenizer has {size}")
    learned = np.flatnonzero(np.diff(row.loss_weights > 0, prepend=False, append=False))
    answers = tuple((int(begin), int(end)) for begin, end in learned.reshape(-1, 2))
    return Tokens(row.token_ids, row.loss_weights, ("tokens",), np.zeros(len(row.token_ids), np.int64), answers, False)
