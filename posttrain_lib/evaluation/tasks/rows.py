"""Rows of a task's file, and prompts as token ids: made as the data of training is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain_lib.data.control_tokens import spells_control_token
from posttrain_lib.data.formats.prompts import parse
from posttrain_lib.data.literal import literal
from posttrain_lib.data.making import make
from posttrain_lib.data.readers import BadRow
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.sources import iter_rows
from posttrain_lib.errors import DataError

if TYPE_CHECKING:
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

Row = TypeVar("Row")
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class _PromptSettings:
    """As ``data.making.Settings``: a task's words stay words, and nothing is cut."""

    trained_turns: str = "each"
    train_on: str = "all"
    control_tokens: str = "as_text"
    max_example_tokens: int = 2**31
    over_length: str = "refuse"


def read_rows(path: str, read: Callable[[str, Mapping[str, Any]], Row], limit: int | None = None) -> list[Row]:
    """The first ``limit`` rows of a file, each as ``read(row id, row)`` has it.

    Raises:
        DataError: rows that cannot be read, or that ``read`` refuses, by name; or there are none.
    """

    def rows() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(iter_rows(path)):
            if number == limit:
                return
            yield row

    return each_of(path, rows(), lambda row: read(*_whole(row)))


def each_of(path: str, rows: Iterable[Row], make_one: Callable[[Row], Any], name: Callable[[Row], str] | None = None):
    """``make_one`` of each row; those that it refuses are named together."""
    made, refused = [], []
    for row in rows:
        try:
            made.append(make_one(row))
        except RefusedRow as why:
            row_id = name(row) if name is not None else str(row[0])  # type: ignore[index]
            refused.append(f"{row_id}: {why.reason}: {why.detail}")
    if refused:
        more = f"; and {len(refused) - _NAMED_AT_MOST:,} more" if len(refused) > _NAMED_AT_MOST else ""
        raise DataError(
            f"{len(refused):,} rows of an evaluation task cannot be used",
            where=path,
            got="; ".join(refused[:_NAMED_AT_MOST]) + more,
            fix="mend or remove these rows; 'fields' names fields that are called otherwise",
        )
    if not made:
        raise DataError("an evaluation task has no rows", where=path, fix="name a file that has some")
    return made


def _whole(row: tuple[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(row[1], BadRow):
        raise RefusedRow(row[1].reason, row[1].detail)
    return row


def prompt_reader(fields: Mapping[str, str]) -> Callable[[str, Mapping[str, Any]], dict[str, Any]]:
    """Reads rows as the format ``prompts`` does; an answer is needed."""

    def read(row_id: str, row: Mapping[str, Any]) -> dict[str, Any]:
        prompt = parse(row, "task", row_id, None, fields)
        if prompt.answer is None:
            raise RefusedRow("no_answer", f"the row has no field {fields.get('answer', 'answer')!r}")
        return {"row_id": row_id, "source": "task", "parsed": prompt, "answer": prompt.answer, "extra": prompt.extra}

    return read


def with_ids(path: str, rows: Sequence[dict[str, Any]], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """Rows of :func:`prompt_reader` with ``prompt_ids``, what serving would send, and plain ``messages``.

    Raises:
        DataError: the template refuses some, by name.
    """

    def one(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row["parsed"]
        ids = make(tokenizer, prompt, _PromptSettings()).documents[0].tokens.ids.tolist()
        messages = [{"role": said.role, "content": said.content} for said in prompt.messages]
        return {key: value for key, value in row.items() if key != "parsed"} | {"prompt_ids": ids, "messages": messages}

    return each_of(path, rows, one, lambda row: str(row["row_id"]))


def text_ids(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Ids of plain text; words that spell a control token stay words.

    Raises:
        RefusedRow: it has no such ids.
    """
    spelt = spells_control_token(tokenizer, text, "as_text")
    return (literal(tokenizer).plain(text) if spelt else tokenizer.encode(text)).ids.tolist()
