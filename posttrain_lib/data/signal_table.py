"""What a frozen model said of each example of a token store: numbers by example, or by trained token.

A folder: ``<column>.npy`` for each column and ``signals.json``, written last. The table belongs to one store (by its
digest) and one model, named by the digests in ``made_of``; a table of other data or another model is refused.

Rows by example: row i is of example i. Rows by token: the trained tokens of example 0 in order, then of example 1, ...
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from posttrain_lib.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.schema.batches import PackedBatch

INDEX_FILE = "signals.json"
#: 2: with a checksum of each column
FORMAT, VERSION = "posttrain-signals", 2
_CHECKED_BYTES = 64 << 20
By = Literal["example", "token"]


class SignalTable:
    """A table, read where it lies (memory-mapped).

    Args:
        folder: the table. store: the examples that it is about.
        made_of: what it must have been made of, by name (``{"model": digest, "tokenizer": digest}``); a subset of
            what the table says.

    Raises:
        DataError: it is no whole table, or of another store, or made of something else; it says of what.
    """

    def __init__(self, folder: Path | str, store: TokenStore, made_of: Mapping[str, str] | None = None) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        self.made_of: dict[str, str] = self.index["made_of"]
        self.by: By = self.index["by"]
        for name, expected in {"store": store.digest, **(made_of or {})}.items():
            if self.made_of.get(name) != expected:
                raise DataError(
                    f"the stored signals are of another {name}",
                    where=self.folder,
                    got=f"{name} {self.made_of.get(name)}",
                    expected=expected,
                    fix="make them again: run the step that made them, without its stored result",
                )
        rows = len(store) if self.by == "example" else int(store.trained_counts.sum())
        self.columns = {name: self._open(name, rows) for name in self.index["columns"]}
        self._starts = np.cumsum(store.trained_counts, dtype=np.int64) - store.trained_counts

    def of_segments(self, batch: PackedBatch) -> dict[str, np.ndarray]:
        """Each column at the batch's segments (numpy): [n, ...], zeros for padding. A table by example."""
        ids = np.asarray(batch.document_ids)
        found = {}
        for name, column in self.columns.items():
            found[name] = np.zeros((len(ids), *column.shape[1:]), column.dtype)
            found[name][ids >= 0] = column[ids[ids >= 0]]
        return found

    def of_tokens(self, batch: PackedBatch) -> dict[str, np.ndarray]:
        """Each column at the batch's supervised tokens (numpy): [N, ...]. A table by token.

        Raises:
            ConfigError: the batch is a rank's part of documents that lie over several, which does not tell how many
                trained tokens stand before its own.
        """
        if batch.prefixes is not None and batch.prefixes.exchange is not None:
            raise ConfigError(
                "stored signals are found by a token's number in its document, and these lie over several ranks",
                where="compute.mesh.context",
                expected="1",
                fix="set compute.mesh.context: 1, or run the teacher during training (distill.teacher.kept: live)",
            )
        index = np.asarray(batch.supervised_index)
        segments = np.searchsorted(batch.cu_seqlens, index, side="right") - 1
        # A document's trained tokens all lie in its own segment, in order.
        numbers = np.arange(len(index)) - np.searchsorted(segments, segments, side="left")
        rows = self._starts[np.asarray(batch.document_ids)[segments]] + numbers
        return {name: column[rows] for name, column in self.columns.items()}

    def _open(self, name: str, rows: int) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            column = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError("a column cannot be read", where=path, got=error, fix="make the signals again") from error
        if len(column) != rows:
            raise DataError("a column has not the store's length", where=path, got=len(column), expected=rows)
        expected = self.index["columns"][name][2]
        if (found := _crc32(path)) != expected:
            raise DataError(
                "a column is not what was written",
                where=path,
                got=f"crc32 {found:08x}",
                expected=f"{expected:08x}",
                fix="make the signals again: run the step that made them, without its stored result",
            )
        return column


class SignalWriter:
    """Writes a table; it exists once :meth:`close` has returned. Rows may come in any order, each once.

    Args:
        folder: made if absent; must not hold a table. by: what a row belongs to.
        columns: name -> (dtype, shape of a row). made_of: the digests of what makes the values.
    """

    def __init__(
        self,
        folder: Path | str,
        store: TokenStore,
        by: By,
        columns: Mapping[str, tuple[Any, tuple[int, ...]]],
        made_of: Mapping[str, str],
    ) -> None:
        self.folder, self.by = Path(folder), by
        self.made_of = {"store": store.digest, **made_of}
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX_FILE).exists():
            raise DataError("the folder holds a table already", where=folder, fix="write to a new folder")
        rows = len(store) if by == "example" else int(store.trained_counts.sum())
        self.columns = {
            name: np.lib.format.open_memmap(
                self.folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=(rows, *shape)
            )
            for name, (dtype, shape) in columns.items()
        }
        self._missing = np.ones(rows, bool)
        self._trained = store.trained_counts
        self._starts = np.cumsum(store.trained_counts, dtype=np.int64) - store.trained_counts

    def put(self, example: int, values: Mapping[str, np.ndarray]) -> None:
        """The values of one example: a row of each column, or one for each of its trained tokens."""
        begin = example if self.by == "example" else int(self._starts[example])
        end = begin + (1 if self.by == "example" else int(self._trained[example]))
        for name, column in self.columns.items():
            column[begin:end] = values[name]
        self._missing[begin:end] = False

    def close(self) -> None:
        """Flush the columns, then write the index.

        Raises:
            DataError: rows were never put.
        """
        if self._missing.any():
            raise DataError(
                "signals are missing", where=self.folder, got=f"{int(self._missing.sum())} rows", expected="none"
            )
        for column in self.columns.values():
            column.flush()
        index = {
            "format": FORMAT,
            "version": VERSION,
            "by": self.by,
            "made_of": self.made_of,
            "columns": {
                name: [str(column.dtype), list(column.shape), _crc32(self.folder / f"{name}.npy")]
                for name, column in self.columns.items()
            },
        }
        unfinished = self.folder / (INDEX_FILE + ".tmp")
        with open(unfinished, "w", encoding="utf-8") as handle:
            json.dump(index, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(unfinished, self.folder / INDEX_FILE)


def _crc32(path: Path) -> int:
    """Of a whole file: what a copy or a disk may do to it, not what somebody means to."""
    found = 0
    with open(path, "rb") as handle:
        while block := handle.read(_CHECKED_BYTES):
            found = zlib.crc32(block, found)
    return found


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("no stored signals are here", where=folder, got=error, fix="make them again") from error
    if (index.get("format"), index.get("version")) != (FORMAT, VERSION):
        raise DataError(
            "these signals are of another version",
            where=folder,
            got=f"{index.get('format')} {index.get('version')}",
            expected=f"{FORMAT} {VERSION}",
            fix="make them again with this version",
        )
    return index
