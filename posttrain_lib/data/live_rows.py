"""Raw rows in the windowed order of :mod:`~posttrain_lib.data.order`, read once, from any place on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from posttrain_lib.data.encoding import RawRow
from posttrain_lib.data.order import epoch_permutation, row_keys, window_size
from posttrain_lib.data.readers import Place
from posttrain_lib.data.sources import look_of, read_from
from posttrain_lib.errors import DataError


class At(NamedTuple):
    """A place in a stream: rows are visited in this order."""

    epoch: int
    window: int
    number: int


@dataclass(frozen=True)
class LiveFile:
    """A file of a source: number of the source, of the file in the source, where it is, digest of its content.

    ``name`` is what row ids call it (:func:`posttrain_lib.data.sources.names_of`); default: its base name. ``look`` is
    how it must still look (:func:`posttrain_lib.data.sources.look_of`) whenever it is opened; default: in any way.
    """

    source: int
    number: int
    path: str
    digest: str
    name: str = ""
    look: str = ""


@dataclass(frozen=True)
class WindowStart:
    """Where reading a window begins: how many files of the epoch are through, and the place in the next."""

    epoch: int
    window: int
    file: int
    place: Place

    def to_json(self) -> list[int]:
        """As a list of integers."""
        return [self.epoch, self.window, self.file, self.place.row, self.place.offset, self.place.line]

    @classmethod
    def from_json(cls, raw: Sequence[int]) -> WindowStart:
        """Inverse of :meth:`to_json`."""
        epoch, window, file, row, offset, line = map(int, raw)
        return cls(epoch, window, file, Place(row, offset, line))


@dataclass(frozen=True)
class Window:
    """One window's rows, shuffled."""

    start: WindowStart
    rows: list[RawRow]


FIRST_WINDOW_START = WindowStart(0, 0, 0, Place(0))


def windows(
    files: Sequence[LiveFile], start: WindowStart, *, window: int, seed: int, epochs: int | None
) -> Iterator[Window]:
    """Windows from ``start`` on, epoch after epoch; without end where ``epochs`` is None.

    Files before the start are not opened. A window ends with its epoch. What follows a window is read only when the
    next one is asked for.

    Raises:
        DataError: a file has no rows, cannot be read, or is another than it was.
    """
    epoch = start.epoch
    while epochs is None or epoch < epochs:
        yield from _epoch(files, start, window, seed)
        epoch += 1
        start = WindowStart(epoch, 0, 0, Place(0))


def _epoch(files: Sequence[LiveFile], start: WindowStart, window: int, seed: int) -> Iterator[Window]:
    # Files are numbered through over the sources here as the token store's order numbers them.
    order = epoch_permutation(len(files), seed, start.epoch)
    rows: list[tuple[int, RawRow]] = []
    number = start.window
    for turn in range(start.file, len(files)):
        which = int(order[turn])
        for place, row in _rows_of(files[which], start.place if turn == start.file else Place(0)):
            if not rows:
                begin = WindowStart(start.epoch, number, turn, place)
            rows.append((which, row))
            if len(rows) == window_size(number, window):
                yield _shuffled(begin, rows, seed)
                rows, number = [], number + 1
    if rows:
        yield _shuffled(begin, rows, seed)


def _rows_of(file: LiveFile, place: Place) -> Iterator[tuple[Place, RawRow]]:
    if file.look and look_of(file.path) != file.look:
        raise DataError(
            "the file was changed while training read it, pass after pass",
            where=file.path,
            fix="start a new run, which trains on the data as they are now; write new data under a new name",
        )
    found = place.row > 0
    for at, row_id, content in read_from(file.path, place, file.name or None):
        found = True
        yield at, RawRow(file.source, file.number, at.row, row_id, content)
    if not found:
        raise DataError("the data file has no rows", where=file.path, fix="remove it from the source, or fill it")


def _shuffled(start: WindowStart, rows: list[tuple[int, RawRow]], seed: int) -> Window:
    numbers = np.array([which for which, _ in rows], np.int64)
    within = np.array([row.row for _, row in rows], np.int64)
    order = np.argsort(row_keys(numbers, within, seed, start.epoch), kind="stable")
    return Window(start, [rows[place][1] for place in order.tolist()])
