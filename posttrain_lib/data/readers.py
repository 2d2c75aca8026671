"""Rows out of the bytes of one file, from a place on: JSON lines, JSON arrays, Parquet, Arrow.

Memory is bounded by the largest row and a constant, whatever the size of the file, of a row group or of an array.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow

from posttrain_lib.data.refusal import kind_of
from posttrain_lib.data.remote import RemoteFile, RemoteObject, file_system, protocols
from posttrain_lib.errors import DataError

_BLOCK = 1 << 18
#: uncompressed Arrow data turned into Python objects, about ten times as large, at once
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 1024
#: a row group up to this size is fetched whole, and the next ones ahead; of a larger one, each column by itself
_WHOLE_GROUP_BYTES = 16 << 20
_ARROW_FILE_MAGIC = b"ARROW1"
#: what a writer of an Arrow stream that comes to its end puts behind the last batch
_ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
#: characters between the place that the decoder blames and the end of a text, where more text may mend it: it blames
#: the start of a token, of which "\\ud83d\\ude00" is the longest, and of a string, which is told from its message
_LONGEST_TOKEN = 12
_ENDS = (",", "]")
_UNFINISHED = "Unterminated string"
_BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Place:
    """Where the reading of one file can go on: at a row.

    ``row`` decides; ``offset`` and ``line`` spare reading what lies before it, and are taken from a place that
    :func:`posttrain_lib.data.sources.read_from` gave.
    """

    #: rows before it in its file; blank lines are none
    row: int
    #: uncompressed bytes before it, for JSON lines; else 0
    offset: int = 0
    #: lines before it, for JSON lines; else 0
    line: int = 0


@dataclass(frozen=True)
class BadRow:
    """A place where a row should be and cannot be read: kept for the quarantine as it stands."""

    reason: str
    detail: str
    raw: str


Read = tuple[Place, str, "dict[str, Any] | BadRow"]


class LocalFile(io.FileIO):
    """A local file, for reading, that must stay what it was when it was opened.

    Compared are size, time of the last write and inode, after every read: what a read gave was there before a change.
    A change that leaves all three as they were goes unseen.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, "rb")
        self._path, self._opened = path, _state(os.fstat(self.fileno()))

    def readinto(self, buffer: Any) -> int:
        """As of :class:`io.FileIO`.

        Raises:
            DataError: the file is another than it was.
        """
        count = super().readinto(buffer)
        self.check()
        return count

    def check(self) -> None:
        """Raise DataError where the file is another than it was, or gone."""
        try:
            now = _state(os.stat(self._path))
        except FileNotFoundError:
            now = None
        if now != self._opened:
            raise DataError(
                "the file was changed while it was read",
                where=self._path,
                got="it is gone" if now is None else _told(now),
                expected=_told(self._opened),
                fix="run again; write new data under a new name, so that no run reads half of each",
            )


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _told(state: tuple[int, int, int]) -> str:
    seconds, nanoseconds = divmod(state[1], 10**9)
    return f"{state[0]:,} bytes, written at {seconds}.{nanoseconds:09d} s of Unix time, inode {state[2]}"


def open_file(file: str, stack: ExitStack) -> Any:
    """The file as a seekable binary file, closed with ``stack``: a local one watched, a remote one read ahead."""
    filesystem, inner = file_system(file)
    if "file" in protocols(filesystem):
        return io.BufferedReader(_watched(inner, stack), _BLOCK)
    source = RemoteObject(file)
    if source.size is None:  # a web server that tells no length serves no ranges either
        return stack.enter_context(fsspec.open(file, "rb"))
    return stack.enter_context(RemoteFile(source))


def _watched(path: str, stack: ExitStack) -> LocalFile:
    """The local file, looked at once more when ``stack`` is left without an error."""
    local = stack.enter_context(LocalFile(path))

    def at_end(kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            local.check()

    stack.push(at_end)
    return local


def numbered(name: str, rows: Iterable[dict[str, Any] | BadRow], first: int) -> Iterator[Read]:
    """Rows with their number in the file as id, ``first`` rows having been before them."""
    for number, row in enumerate(rows, start=first):
        yield Place(number), f"{name}:{number + 1}", row


def json_lines(file: str, name: str, compression: str | None, place: Place) -> Iterator[Read]:
    """Rows of JSON lines, ids by line.

    A plain file is read from ``place.offset`` on. A compressed one has to be decompressed from its start; several
    streams in one file are one. A cut or damaged one gives the rows before the damage, then the decompressor's error:
    never a part of a line.
    """
    if place.row and not place.offset:
        yield from itertools.dropwhile(
            lambda read: read[0].row < place.row, json_lines(file, name, compression, Place(0))
        )
        return
    row, offset, number = place.row, place.offset, place.line
    with ExitStack() as stack:
        raw = open_file(file, stack)
        if compression is None:
            raw.seek(offset)
        lines = _buffered(raw, compression)
        if compression is not None:
            _skip(lines, offset)
        for line in lines:
            number += 1
            # isspace looks at a row's first byte; strip would copy every row.
            if not (line.isspace() or (line.startswith(codecs.BOM_UTF8) and not line[len(codecs.BOM_UTF8) :].strip())):
                yield Place(row, offset, number - 1), f"{name}:{number}", _parse(line)
                row += 1
            offset += len(line)


def is_json_array(file: str, compression: str | None) -> bool:
    """Whether the first character that is not blank opens an array."""
    with ExitStack() as stack:
        handle, start = _buffered(open_file(file, stack), compression), b""
        while not start and (block := handle.read(256)):
            start = block.removeprefix(codecs.BOM_UTF8).lstrip()
    return start[:1] == b"["


def json_array(file: str, compression: str | None) -> Iterator[dict[str, Any] | BadRow]:
    """Elements of an array, one at a time.

    Raises:
        DataError: the array is broken or cut; the elements before that place have been given by then.
    """
    with ExitStack() as stack:
        window = _Window(_buffered(open_file(file, stack), compression), file)
        window.expect("[")
        if window.peek() != "]":
            while True:
                row = window.element()
                if window.repeated is not None:
                    yield _repeated(window.repeated, json.dumps(row))
                else:
                    yield row if isinstance(row, dict) else _no_object(row, json.dumps(row))
                if window.peek() != ",":
                    break
                window.expect(",")
        window.expect("]")
        if window.peek():
            raise window.broken("there is more behind the array's end")


class _Window:
    """The part of a JSON text that is looked at: it grows until an element fits and forgets what was read."""

    def __init__(self, handle: io.BufferedReader, file: str) -> None:
        self._handle, self._file = handle, file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode = json.JSONDecoder(object_pairs_hook=self._object).raw_decode
        #: a key that the last element has twice in one object
        self.repeated: str | None = None
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            self._at = _end_of_blank(self._text, self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._grow()

    def expect(self, character: str) -> None:
        """Pass over ``character``."""
        if self.peek() != character:
            raise self.broken(f"expected {character!r}, not {self.peek() or 'the end'!r}")
        self._at += 1

    def element(self) -> Any:
        """Pass over one value. One that touches the window's end may go on behind it: 12 is the start of 123."""
        self.peek()
        while True:
            self.repeated = None
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self._text) - _LONGEST_TOKEN or error.msg.startswith(_UNFINISHED)
                if self._ended or not near_end:
                    raise self.broken(str(error)) from error
            else:
                behind = _end_of_blank(self._text, end)
                # "5." is 5 and the start of 5.3: what follows must end an element, unless it cannot be a number's rest.
                if self._ended or self._text[behind : behind + 1] in _ENDS or len(self._text) - end > _LONGEST_TOKEN:
                    self._at = end
                    return value
            self._grow()

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.repeated = self.repeated or _twice(pairs)
        return dict(pairs)

    def broken(self, problem: str) -> DataError:
        """The error for an array that is none."""
        return DataError(
            "the file starts as a JSON array and does not end as one",
            where=self._file,
            got=problem,
            fix="write it again",
        )

    def _grow(self) -> None:
        # Doubled where that much is there: an element is then tried again as often as its length doubles.
        left = len(self._text) - self._at
        data = self._handle.read1(max(_BLOCK, left))
        self._ended = not data
        try:
            self._text, self._at = self._text[self._at :] + self._utf8.decode(data, final=self._ended), 0
        except UnicodeDecodeError as error:
            raise self.broken(str(error)) from error


def parquet(file: str, first: int) -> Iterator[dict[str, Any] | BadRow]:
    """Rows from number ``first`` on, by row group and, within one, by batches; groups before are not read."""
    import pyarrow.parquet

    with ExitStack() as stack:
        handle = open_file(file, stack)
        # Columns are read in slices, as the batches need them, instead of whole row groups at once.
        table = pyarrow.parquet.ParquetFile(handle, buffer_size=_BLOCK, pre_buffer=False)
        decode = _decoder(table.schema_arrow, file)
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            if first >= group.num_rows:
                first -= group.num_rows
                continue
            if isinstance(handle, RemoteFile):
                _announce(handle, [_span(group.column(column)) for column in range(group.num_columns)])
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
            for batch in table.iter_batches(size, row_groups=[number], use_threads=False):
                yield from map(decode, batch.slice(first).to_pylist())
                first = max(0, first - batch.num_rows)


def _span(column: Any) -> tuple[int, int]:
    start = column.data_page_offset
    if column.has_dictionary_page:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size


def _announce(handle: RemoteFile, spans: list[tuple[int, int]]) -> None:
    """Tell what a row group will read, so that it is under way before it is asked for."""
    if not spans:
        return
    start, end = min(start for start, _ in spans), max(end for _, end in spans)
    if end - start <= _WHOLE_GROUP_BYTES:
        handle.hold(start, end)
    else:
        handle.follow(spans)


def arrow(files: list[str], first: int) -> Iterator[dict[str, Any] | BadRow]:
    """Rows from number ``first`` on of Arrow IPC files or streams, one after another, by record batch.

    A local file is mapped, so that what lies before costs nothing; a remote one is read from its start.
    """
    for file in files:
        with ExitStack() as stack:
            schema, batches, check = _record_batches(file, stack)
            decode = _decoder(schema, file)
            for batch in batches:
                size = max(1, min(_BATCH_ROWS, _BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
                for start in range(first, batch.num_rows, size):
                    rows = batch.slice(start, size).to_pylist()
                    check()
                    yield from map(decode, rows)
                first = max(0, first - batch.num_rows)


def _record_batches(file: str, stack: ExitStack) -> tuple[Any, Iterator[Any], Callable[[], None]]:
    """Schema, record batches, and the check before rows made of them are given: a map shows what is written to it."""
    import pyarrow.ipc

    filesystem, inner = file_system(file)
    check: Callable[[], None] = _nothing
    if "file" in protocols(filesystem):
        check = _watched(inner, stack).check
        source = stack.enter_context(pyarrow.memory_map(inner))
    else:
        source = stack.enter_context(pyarrow.PythonFile(open_file(file, stack), mode="r"))
    magic = source.read(len(_ARROW_FILE_MAGIC))
    source.seek(0)
    if magic == _ARROW_FILE_MAGIC:
        table = pyarrow.ipc.open_file(source)
        return table.schema, map(table.get_batch, range(table.num_record_batches)), check
    table = pyarrow.ipc.open_stream(source)
    return table.schema, _whole(table, source, file), check


def _whole(table: Any, source: Any, file: str) -> Iterator[Any]:
    """Record batches of a stream.

    Raises:
        DataError: at its end, which Arrow's reader takes for good: it was cut between two batches, or another stream
            stands behind it.
    """
    yield from table
    source.seek(source.tell() - len(_ARROW_STREAM_END))
    cut = source.read(len(_ARROW_STREAM_END)) != _ARROW_STREAM_END
    if cut or source.read(1):
        raise DataError(
            "the Arrow stream has no end mark: it was cut, or its writer was stopped"
            if cut
            else "there is more behind the end of the Arrow stream, and it would not be read",
            where=file,
            fix="write it again",
        )


def _nothing() -> None:
    """The check of a remote file: whoever fetches its bytes makes it."""


def _decoder(schema: Any, file: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns a row of Arrow's into the row that was written.

    The ``datasets`` library stores objects of differing fields as JSON text and says so in the schema.

    Raises:
        DataError: two fields of one object have one name, of which a row of Python's could keep the last alone.
    """
    if (name := _named_twice(schema)) is not None:
        raise DataError(
            "two columns of the file have one name: which of them is meant?",
            where=file,
            got=name,
            fix="write the file with one of them, or with names that differ",
        )
    told = (schema.metadata or {}).get(b"huggingface", b"")
    if b'"_type": "Json"' not in told:
        return _without_nulls
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    return lambda row: _without_nulls(features.decode_example(row))


def _named_twice(fields: Iterable[Any]) -> str | None:
    """A name that two fields of one object have, at whatever depth."""
    fields = list(fields)
    names = [field.name for field in fields]
    for field in fields:
        if names.count(field.name) > 1:
            return str(field.name)
        kind = field.type
        if (name := _named_twice(kind.field(number) for number in range(kind.num_fields))) is not None:
            return name
    return None


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object of a column all fields that any of them has; those that are null were not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def without_nulls(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a library that reads Arrow, without the fields that Arrow invented."""
    return map(_without_nulls, rows)


def _buffered(raw: Any, compression: str | None) -> io.BufferedReader:
    if compression is not None:
        # Arrow's decompressor knows a cut stream from a whole one and reads several in a row; Python's zstd does not.
        raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), compression)
    return io.BufferedReader(raw, _BLOCK)


def _skip(handle: io.BufferedReader, count: int) -> None:
    while count and (block := handle.read(min(count, _BLOCK))):
        count -= len(block)


def _end_of_blank(text: str, at: int) -> int:
    found = _BLANK.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _parse(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(text := line.decode("utf-8-sig"), object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", str(error), line.decode("utf-8", errors="replace"))
    except _RepeatedKeyError as error:
        return _repeated(str(error), text)
    except (ValueError, RecursionError) as error:
        return BadRow("broken_json", str(error), line.decode("utf-8"))
    return row if isinstance(row, dict) else _no_object(row, line.decode("utf-8"))


class _RepeatedKeyError(Exception):
    """Carries the key."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (key := _twice(pairs)) is not None:
        raise _RepeatedKeyError(key)
    return dict(pairs)


def _twice(pairs: list[tuple[str, Any]]) -> str | None:
    """A key that is there twice; Python's reader would keep its last value without a word."""
    if len(pairs) == len(dict(pairs)):
        return None
    keys = [key for key, _ in pairs]
    return next(key for number, key in enumerate(keys) if key in keys[:number])


def _repeated(key: str, raw: str) -> BadRow:
    return BadRow("repeated_key", f"the key {key!r} is there twice in one object: which value is meant?", raw)


def _no_object(value: Any, raw: str) -> BadRow:
    return BadRow("not_an_object", f"the row is {kind_of(value)}, expected an object", raw)
