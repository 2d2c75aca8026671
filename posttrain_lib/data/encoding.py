"""From raw rows to examples, as a worker does it: parse, render, mask, tokenise, and look for what is odd.

The preparation and the training that tokenises on the fly both go through here, so that they give the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from posttrain_lib.data.chat_tokenizer import ChatTokenizer
from posttrain_lib.data.formats import get_format
from posttrain_lib.data.formats.common import group_is_named
from posttrain_lib.data.making import Made, MadeDocument, make
from posttrain_lib.data.near_duplicates import signatures
from posttrain_lib.data.oddities import Oddities
from posttrain_lib.data.readers import BadRow
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.split import is_held_out, split_place
from posttrain_lib.data.tokenize import Tokens
from posttrain_lib.schema.examples import Conversation, Message, ParsedRow, PlainText, PreferencePair, Prompt, TokenRow

if TYPE_CHECKING:
    from posttrain_lib.config.data import DataConfig
    from posttrain_lib.data.engine_gate import GateReport


class RawRow(NamedTuple):
    """A row as it was read: number of its source, of its file in the source, and of the row in the file."""

    source: int
    file: int
    row: int
    row_id: str
    content: dict[str, Any] | BadRow


@dataclass(frozen=True)
class Example:
    """A document for the token store.

    ``shared`` of its first tokens, none of them trained, are those of the row's document before it. ``prompt_tokens``
    is where its first answer begins. ``margin`` is that of the pair that it belongs to. ``signature`` is that of
    :mod:`~posttrain_lib.data.near_duplicates`; empty where none was asked for.
    """

    row_id: str
    ids: np.ndarray
    weights: np.ndarray
    shared: int
    prompt_tokens: int
    by_role: Counter[str]
    trained_by_role: Counter[str]
    truncated: bool
    closed: bool
    resplit: bool
    margin: float | None = None
    signature: bytes = b""


@dataclass(frozen=True)
class EncodedRow:
    """What one row became. ``refused`` is (reason, detail) where nothing of it can be used; ``raw`` is then the row.

    ``left_out`` are (row id, reason, detail) of its documents that cannot be used. ``prompt`` is what serving would
    send before the last answer, for held-out rows, or the whole row where it is a prompt for RL. ``answered`` are
    digests of the prompts that its examples answer. ``split_place`` is that of its group (see
    :func:`~posttrain_lib.data.split.split_place`). ``read_tokens`` and ``left_out_tokens``: see
    :class:`~posttrain_lib.data.making.Made`; of a refused row all are left out.
    """

    source: int
    file: int
    row: int
    row_id: str
    kind: str = "document"
    examples: tuple[Example, ...] = ()
    held_out: bool = False
    refused: tuple[str, str] | None = None
    left_out: tuple[tuple[str, str, str], ...] = ()
    raw: Any = None
    notes: Counter[str] = field(default_factory=Counter)
    prompt: dict[str, Any] | None = None
    answered: tuple[bytes, ...] = ()
    split_place: int = 0
    read_tokens: int = 0
    left_out_tokens: int = 0


class RowEncoder:
    """Encodes rows of a configured set of sources. One is made in each worker process.

    Args:
        config: a DataConfig, or anything with its attributes; ``chat_template`` is a path or None.
        verdict: what the gate of the tokenising engines said, so that a worker need not ask again.
        inspect: also look for oddities and sign examples for the search for near-duplicates.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer_folder: str | Path,
        verdict: GateReport | None = None,
        *,
        inspect: bool = True,
    ) -> None:
        self.config = config
        self.tokenizer = ChatTokenizer(
            tokenizer_folder,
            chat_template=config.chat_template,
            template_date=config.template_date,
            template_kwargs=config.template_kwargs,
            engine=config.engine,
            verdict=verdict,
        )
        self._inspect = inspect
        self._sources = [(source.name, get_format(source.format), source.fields) for source in config.sources]
        self._control_tokens = frozenset(self.tokenizer.markers)

    def encode(self, rows: Sequence[RawRow]) -> tuple[list[EncodedRow], Oddities]:
        """Each row, in order, and what was odd about their texts."""
        oddities = Oddities(self._control_tokens)
        encoded = [self._encode(row, oddities) for row in rows]
        return (_signed(encoded) if self._inspect else encoded), oddities

    def _encode(self, raw: RawRow, oddities: Oddities) -> EncodedRow:
        name, parse, fields = self._sources[raw.source]
        try:
            if isinstance(raw.content, BadRow):
                raise RefusedRow(raw.content.reason, raw.content.detail)
            parsed = parse(raw.content, name, raw.row_id, self.config.held_out.group_field, fields)
            if self._inspect:
                for role, text in texts_of(parsed):
                    oddities.observe(name, raw.row_id, role, text)
            made = make(self.tokenizer, parsed, self.config)
        except RefusedRow as refusal:
            content = raw.content.raw if isinstance(raw.content, BadRow) else raw.content
            return EncodedRow(
                *raw[:4],
                refused=(refusal.reason, refusal.detail),
                raw=content,
                read_tokens=refusal.tokens,
                left_out_tokens=refusal.tokens,
            )
        group = parsed.group or _own_group(parsed)
        held_out = is_held_out(group, self.config.held_out)
        left_out = tuple((raw.row_id + suffix, why.reason, why.detail) for suffix, why in made.left_out)
        return EncodedRow(
            *raw[:4],
            kind="document" if made.kind == "documents" else made.kind,
            examples=_examples(raw.row_id, made),
            held_out=held_out,
            left_out=left_out,
            raw=raw.content if left_out or self.config.deduplicate else None,
            notes=made.notes + Counter([_grouped_by(parsed.group)]),
            prompt=self._prompt(parsed, made, held_out=held_out),
            answered=() if held_out else tuple(_prompts_answered(made)),
            split_place=split_place(group, self.config.held_out),
            read_tokens=made.read_tokens,
            left_out_tokens=made.left_out_tokens,
        )

    def _prompt(self, parsed: ParsedRow, made: Made, *, held_out: bool) -> dict[str, Any] | None:
        if isinstance(parsed, Prompt):
            ids = made.documents[0].tokens.ids.tolist()
            asked = {"prompt_ids": ids, "messages": [_plain(message) for message in parsed.messages]}
            more = {"tools": _as_json(list(parsed.tools)), "extra": _as_json(parsed.extra)}
            return {"source": parsed.source, "row_id": parsed.row_id, **asked, "answer": parsed.answer, **more}
        before: tuple[Message, ...]
        if isinstance(parsed, PreferencePair):  # answered as the chosen one begins
            last, number = made.documents[0], 0
            before = parsed.prompt
        elif isinstance(parsed, Conversation) and made.documents[-1].last_turn is not None:
            last, number = made.documents[-1], -1
            before = parsed.messages[: last.last_turn]
        else:
            return None
        # A document that was cut may have lost its last answer, or what was before.
        if not held_out or last.truncated:
            return None
        first, end = last.tokens.answers[number]
        return {
            "source": parsed.source,
            "row_id": parsed.row_id,
            "prompt_ids": last.tokens.ids[:first].tolist(),
            "messages": [{"role": said.role, "content": said.content} for said in before],
            # As a generation would be read: what the model writes, markers left out.
            "answer": self.tokenizer.decode(last.tokens.ids[first:end].tolist()).strip(),
        }


def _signed(rows: list[EncodedRow]) -> list[EncodedRow]:
    """The rows with signatures; all at once, which costs a tenth of one by one."""
    made = iter(signatures([example.ids for row in rows for example in row.examples]))
    return [
        replace(row, examples=tuple(replace(example, signature=next(made).tobytes()) for example in row.examples))
        for row in rows
    ]


def make_encoder(config: Any, tokenizer_folder: str, verdict: GateReport | None, inspect: bool) -> RowEncoder:
    """What a worker process makes once."""
    return RowEncoder(config, tokenizer_folder, verdict, inspect=inspect)


def make_live_encoder(config: Any, tokenizer_folder: str) -> RowEncoder:
    """What a worker process of a training run makes once. It will read on: the faster engine is asked for at once,
    while the model loads, and not when enough has been read to be worth it."""
    encoder = RowEncoder(config, tokenizer_folder, inspect=False)
    encoder.tokenizer.gate_verdict()
    return encoder


def encode_rows(encoder: RowEncoder, rows: Sequence[RawRow]) -> tuple[list[EncodedRow], Oddities]:
    """What a worker process does with each item."""
    return encoder.encode(rows)


def name_rows(rows: Sequence[RawRow]) -> str:
    """For errors: which rows an item holds."""
    return f"rows {rows[0].row_id} to {rows[-1].row_id}" if rows else "no rows"


def prompt_digest(ids: np.ndarray) -> bytes:
    """16 bytes by which prompts are compared."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i4").tobytes()).digest()[:16]


def example_digest(example: Example) -> bytes:
    """16 bytes by which whole examples are compared: ids and weights."""
    both = (np.ascontiguousarray(example.ids, "<i4"), np.ascontiguousarray(example.weights, "<f4"))
    return hashlib.sha256(b"".join(part.tobytes() for part in both)).digest()[:16]


def texts_of(row: ParsedRow) -> list[tuple[str, str]]:
    """(role, text) of everything that a person wrote into the row."""
    if isinstance(row, PlainText):
        return [("text", row.text)]
    if isinstance(row, PreferencePair):
        messages: tuple[Message, ...] = (*row.prompt, *row.chosen, *row.rejected)
    else:
        messages = row.messages if isinstance(row, Conversation | Prompt) else ()
    # A call needs no words beside it: its empty content is nothing that anybody left out.
    said = [(m.role, m.content) for m in messages if m.content is not None and (m.content or not m.tool_calls)]
    thought = [(message.role, message.reasoning_content) for message in messages if message.reasoning_content]
    return said + thought


def _examples(row_id: str, made: Made) -> tuple[Example, ...]:
    examples: list[Example] = []
    before: Tokens | None = None
    for document in made.documents:
        shared = 0 if before is None else shared_prefix(before, document.tokens)
        examples.append(_example(row_id, document, shared, made.margin))
        before = document.tokens
    return tuple(examples)


def _example(row_id: str, document: MadeDocument, shared: int, margin: float | None) -> Example:
    tokens = document.tokens
    return Example(
        row_id=row_id + document.suffix,
        ids=np.asarray(tokens.ids, np.int32),
        weights=np.asarray(tokens.weights, np.float32),
        shared=shared,
        prompt_tokens=tokens.answers[0][0] if tokens.answers else len(tokens.ids),
        by_role=tokens.by_role,
        trained_by_role=tokens.trained_by_role,
        truncated=document.truncated,
        closed=document.closed,
        resplit=tokens.resplit,
        margin=margin,
    )


def shared_prefix(before: Tokens, after: Tokens) -> int:
    """Tokens at the start of both that need be computed once: alike, and trained in neither.

    One less than are alike: a document goes on from the last token that it shares, because that one predicts another
    token in each.
    """
    limit = min(len(before.ids), len(after.ids))
    unlike = (before.ids[:limit] != after.ids[:limit]) | (before.weights[:limit] != 0) | (after.weights[:limit] != 0)
    alike = int(np.argmax(unlike)) if unlike.any() else limit
    return max(0, alike - 1)


def _prompts_answered(made: Made) -> list[bytes]:
    if made.kind == "prompt":  # answered as training asks it
        return [prompt_digest(made.documents[0].tokens.ids)]
    found = []
    for document in made.documents:
        found += [prompt_digest(document.tokens.ids[:first]) for first, _ in document.tokens.answers]
    return found


def _own_group(row: ParsedRow) -> str:
    """The group of a row that has neither a named one nor a first question: by its content, so that a copy of the row
    elsewhere stands on the same side of the split, and the row stays there when files are renamed or put in order."""
    if isinstance(row, TokenRow):
        return f"tokens:{prompt_digest(row.token_ids).hex()}"
    assert isinstance(row, PlainText)
    return f"text:{row.text}"


def _grouped_by(group: str | None) -> str:
    """The receipt's note on what decides whether the row is held out."""
    if group is None:
        return "grouped_by_row"
    return "grouped_by_field" if group_is_named(group) else "grouped_by_first_question"


def _plain(message: Message) -> dict[str, Any]:
    """A message as JSON."""
    plain: Mapping[str, Any] = {
        "role": message.role,
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "tool_calls": list(message.tool_calls),
        **message.extra,
    }
    return {key: _as_json(value) for key, value in plain.items() if value not in (None, [])}


def _as_json(value: Any) -> Any:
    """The value as JSON has it: rows of Parquet and Arrow hold times, bytes and decimals, too, which become text."""
    return json.loads(json.dumps(value, default=str))
