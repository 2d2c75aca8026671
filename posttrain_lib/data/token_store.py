"""Tokenised examples on disk: Arrow shards, memory-mapped, with an index that is written last.

    store/
        shard-00000.arrow ...  one record batch each: tokens list<int32>, weights list<float32>,
                               source dictionary<string>, row_id string
        examples.arrow         one row per example: length, weight_sum, trained, source, kind, shared, file, row, margin
        index.json             counts, digest, fingerprint, the sources' files, size and sha256 of every file above,
                               and of all that it says itself

``examples.arrow`` holds what packing and the loss divisor need, so neither ever reads a token. A folder without
``index.json`` is not a store: its writer did not finish.

An example knows the row it was made from (``file`` of its source, ``row`` in that file); examples of one row follow one
another. ``shared`` is how many of its first tokens, none of them trained, are those of the example before it, so that
both can share their computation; ``kind`` is ``document``, ``pair`` (chosen, then rejected) or ``prompt``. ``margin``
is how much better the chosen one of its pair is, float32, in the unit of whoever judged; NaN where nobody said.

The first token of a document is never predicted, so its weight never counts: ``weight_sum`` and ``trained`` are
taken over ``loss_weights[1:]``, here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from posttrain_lib.errors import DataError
from posttrain_lib.lineage.digests import digest_value
from posttrain_lib.schema.examples import TokenizedExample

INDEX_FILE = "index.json"
EXAMPLES_FILE = "examples.arrow"
FORMAT = "posttrain-token-store"
VERSION = 5
KINDS = ("document", "pair", "prompt")

# Tokens in one shard: 8 bytes each on disk and, while it is being written, in memory: 64 MiB.
SHARD_TOKENS = 8 * 1024 * 1024


class TokenStoreWriter:
    """Writes a token store; the store exists once :meth:`close` has returned.

    Args:
        folder: made if absent; must not hold a store yet.
        shard_tokens: a shard is written as soon as it holds this many tokens.
        fingerprint: digests of what made the tokens (tokenizer, template), for training to compare.

    Raises:
        DataError: the folder holds a store already.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        shard_tokens: int = SHARD_TOKENS,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._shard_tokens = shard_tokens
        if (self._folder / INDEX_FILE).exists():
            raise DataError("the folder holds a token store already", where=self._folder, fix="write to a new folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pending: list[TokenizedExample] = []
        self._pending_tokens = 0
        self._files: list[dict[str, Any]] = []
        self._sources: dict[str, int] = {}
        self._lengths = array("i")
        self._weight_sums = array("d")
        self._trained = array("i")
        self._source_index = array("i")
        self._kinds = array("b")
        self._shared = array("i")
        self._file_index, self._row_index = array("i"), array("q")
        self._margins = array("f")
        self._source_files: dict[str, list[tuple[str, int]]] = {}
        self._fingerprint = dict(fingerprint or {})
        self._largest_id = -1
        self._content = hashlib.sha256()
        self._closed = False

    def add(
        self,
        example: TokenizedExample,
        *,
        kind: str = "document",
        shared: int = 0,
        row: tuple[int, int] | None = None,
        margin: float | None = None,
    ) -> None:
        """Append one example.

        Args:
            shared: tokens that it begins with as the example before it does; see the module's text.
            row: (file of the source, row in it) that it was made from; default: a row of its own in file 0.
            margin: of its pair; None: not said.

        Raises:
            DataError: empty, of unequal lengths, with a token id outside int32, a weight that is negative or not
                finite, or a margin that float32 does not hold; the row is named.
        """
        tokens = np.ascontiguousarray(example.token_ids, dtype=np.int32)
        weights = np.ascontiguousarray(example.loss_weights, dtype=np.float32)
        self._check(example, tokens, weights)
        if not 0 <= shared < min(len(tokens), *self._lengths[-1:] or [1]):
            raise DataError("no such prefix to share", where=f"{example.source}: {example.row_id}", got=shared)
        if margin is not None and not abs(margin) <= float(np.finfo(np.float32).max):
            where = f"{example.source}: {example.row_id}"
            raise DataError("a margin that float32 does not hold", where=where, got=margin, expected="a finite number")
        self._margins.append(math.nan if margin is None else margin)
        self._kinds.append(KINDS.index(kind))
        self._shared.append(shared)
        file, row_number = row or (0, len(self._row_index))
        self._file_index.append(file)
        self._row_index.append(row_number)
        self._largest_id = max(self._largest_id, int(tokens.max()))
        counted = weights[1:]
        self._lengths.append(len(tokens))
        self._weight_sums.append(float(counted.sum(dtype=np.float64)))
        self._trained.append(int(np.count_nonzero(counted)))
        self._source_index.append(self._sources.setdefault(example.source, len(self._sources)))
        # The digest is of the content, not of the files: another Arrow version writes other bytes for the same data.
        for text in (example.source, example.row_id):
            encoded = text.encode()
            self._content.update(len(encoded).to_bytes(8, "little") + encoded)
        for number in (len(tokens), self._kinds[-1], shared, file, row_number):
            self._content.update(int(number).to_bytes(8, "little"))
        self._content.update(np.float32(self._margins[-1]).astype("<f4").tobytes())
        self._content.update(tokens.astype("<i4", copy=False).data)
        self._content.update(weights.astype("<f4", copy=False).data)
        self._pending.append(TokenizedExample(tokens, weights, example.source, example.row_id))
        self._pending_tokens += len(tokens)
        if self._pending_tokens >= self._shard_tokens:
            self._write_shard()

    def state_files(self, source: str, files: Sequence[tuple[str, int]]) -> None:
        """Say what a source was read from: (name, rows read, refused ones among them) in the order of reading."""
        self._source_files[source] = [(name, int(rows)) for name, rows in files]

    def close(self) -> None:
        """Write what is pending, then the index. Calling it again does nothing."""
        if self._closed:
            return
        if self._pending:
            self._write_shard()
        table = pa.record_batch(
            {
                "length": pa.array(self._lengths, pa.int32()),
                "weight_sum": pa.array(self._weight_sums, pa.float64()),
                "trained": pa.array(self._trained, pa.int32()),
                "source": pa.array(self._source_index, pa.int32()),
                "kind": pa.array(self._kinds, pa.int8()),
                "shared": pa.array(self._shared, pa.int32()),
                "file": pa.array(self._file_index, pa.int32()),
                "row": pa.array(self._row_index, pa.int64()),
                "margin": pa.array(self._margins, pa.float32()),
            }
        )
        shards = list(self._files)
        examples = self._write_file(EXAMPLES_FILE, table)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "examples": len(self._lengths),
            "tokens": sum(self._lengths),
            "trained_tokens": sum(self._trained),
            "weight": sum(self._weight_sums),
            "longest": max(self._lengths, default=0),
            "largest_id": self._largest_id,
            "margins": sum(not math.isnan(margin) for margin in self._margins),
            "sources": list(self._sources),
            "digest": self._content.hexdigest(),
            "fingerprint": self._fingerprint,
            "source_files": self._source_files,
            "shards": shards,
            "examples_file": examples,
        }
        unfinished = self._folder / (INDEX_FILE + ".tmp")
        with open(unfinished, "w", encoding="utf-8") as handle:
            json.dump({**index, "sha256": digest_value(index)}, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(unfinished, self._folder / INDEX_FILE)
        self._closed = True

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    @staticmethod
    def _check(example: TokenizedExample, tokens: np.ndarray, weights: np.ndarray) -> None:
        def refuse(what: str, got: object, expected: str) -> None:
            raise DataError(what, where=f"{example.source}: {example.row_id}", got=got, expected=expected)

        if tokens.ndim != 1 or tokens.shape != weights.shape or len(tokens) == 0:
            refuse(
                "tokens and weights do not belong together", (tokens.shape, weights.shape), "two equal, non-empty rows"
            )
        if not np.array_equal(tokens, example.token_ids) or int(tokens.min()) < 0:
            refuse("token ids that are no int32", example.token_ids, "ids from 0 to 2147483647")
        if not np.isfinite(weights).all() or float(weights.min()) < 0.0:
            refuse("a loss weight is negative or not finite", float(weights.min()), "finite weights of at least 0")

    def _write_shard(self) -> None:
        pending = self._pending
        ends = np.cumsum([0] + [len(example.token_ids) for example in pending], dtype=np.int32)

        def ragged(parts: list[np.ndarray]) -> pa.Array:
            return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(parts)))

        batch = pa.record_batch(
            {
                "tokens": ragged([example.token_ids for example in pending]),
                "weights": ragged([example.loss_weights for example in pending]),
                "source": pa.array([example.source for example in pending]).dictionary_encode(),
                "row_id": pa.array([example.row_id for example in pending], pa.string()),
            }
        )
        self._files.append(self._write_file(f"shard-{len(self._files):05d}.arrow", batch))
        self._pending, self._pending_tokens = [], 0

    def _write_file(self, name: str, batch: pa.RecordBatch) -> dict[str, Any]:
        path = self._folder / name
        with open(path, "wb") as handle:
            with pa.ipc.new_file(handle, batch.schema) as writer:
                writer.write_batch(batch)
            handle.flush()
            os.fsync(handle.fileno())
        return {"file": name, "examples": batch.num_rows, "bytes": path.stat().st_size, "sha256": _sha256(path)}


class TokenStore:
    """Random access to a finished token store; shards are mapped on first use, nothing is copied.

    Attributes:
        lengths: int32 [N], tokens of each example.
        weight_sums: float64 [N], sum of the weights that count (see the module's text).
        trained_counts: int32 [N], how many of them are not zero.
        source_index: int32 [N], index into ``sources``.
        kinds: int8 [N], index into :data:`KINDS`.
        shared: int32 [N]. file_index: int32 [N]. row_index: int64 [N]. See the module's text.
        margins: float32 [N], see the module's text; None where no example has one.
        source_files: source -> [(file, rows read from it)], in the order of reading; may lack sources.
        fingerprint: digests of what made the tokens.
        sources: names, in order of first appearance.
        largest_id: the largest token id in it, -1 for an empty store.
        digest: sha256 of the content: the same examples in the same order give the same digest.

    Raises:
        DataError: no finished store in the folder, a file that is missing, truncated or damaged; it is named.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self._files: list[dict[str, Any]] = index["shards"]
        self.sources: list[str] = index["sources"]
        self.digest: str = index["digest"]
        self.total_tokens: int = index["tokens"]
        self.trained_tokens: int = index["trained_tokens"]
        self.total_weight: float = index["weight"]
        self.longest: int = index["longest"]
        self.largest_id: int = index["largest_id"]
        self.fingerprint: dict[str, str] = index["fingerprint"]
        self.source_files: dict[str, list[tuple[str, int]]] = index["source_files"]
        self._examples_file: dict[str, Any] = index["examples_file"]
        for entry in [*self._files, self._examples_file]:
            self._check_size(entry)
        self._check_content(self._examples_file)
        columns = self._map(self._examples_file)
        self.lengths = columns.column("length").to_numpy()
        self.weight_sums = columns.column("weight_sum").to_numpy()
        self.trained_counts = columns.column("trained").to_numpy()
        self.source_index = columns.column("source").to_numpy()
        self.kinds = columns.column("kind").to_numpy()
        self.shared = columns.column("shared").to_numpy()
        self.file_index = columns.column("file").to_numpy()
        self.row_index = columns.column("row").to_numpy()
        self.margins: np.ndarray | None = columns.column("margin").to_numpy() if index["margins"] else None
        # Where each shard's examples start; the last entry is the number of examples.
        self._starts = [0]
        for entry in self._files:
            self._starts.append(self._starts[-1] + entry["examples"])
        self._starts_array = np.asarray(self._starts)
        if not self._starts[-1] == len(self.lengths) == index["examples"]:
            raise DataError(
                "the token store disagrees with itself about how many examples it holds",
                where=self.folder / INDEX_FILE,
                got=f"{self._starts[-1]} in shards, {len(self.lengths)} in {EXAMPLES_FILE}, {index['examples']} stated",
                fix="prepare the data again",
            )
        self._shards: dict[int, Shard] = {}

    @property
    def file_digests(self) -> dict[str, str]:
        """File of the store -> first half of its sha256: small, and enough to name a file that changed."""
        return {entry["file"]: entry["sha256"][:32] for entry in [*self._files, self._examples_file]}

    def __len__(self) -> int:
        return len(self.lengths)

    def get(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [S]) and loss weights (float32 [S], target-aligned) as read-only views of the file."""
        shard, offset = self._locate(example)
        begin, end = shard.offsets[offset], shard.offsets[offset + 1]
        return shard.tokens[begin:end], shard.weights[begin:end]

    def shards_of(self, examples: np.ndarray) -> Iterator[tuple[np.ndarray, Shard, np.ndarray]]:
        """For each shard that holds some of ``examples``: (which of them, the shard, their numbers within it)."""
        numbers = np.searchsorted(self._starts_array, examples, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        bounds = [0, *(np.flatnonzero(np.diff(numbers[order])) + 1).tolist(), len(order)]
        for begin, end in pairwise(bounds if len(order) else ()):
            chosen = order[begin:end]
            number = int(numbers[chosen[0]])
            yield chosen, self._shard(number), examples[chosen] - self._starts[number]

    def row_id(self, example: int) -> str:
        """The id of the row that the example was made from."""
        shard, offset = self._locate(example)
        return shard.row_ids[offset].as_py()

    def source(self, example: int) -> str:
        """The name of the example's source."""
        return self.sources[int(self.source_index[example])]

    def verify(self) -> None:
        """Read every file and compare its sha256 with the index.

        Raises:
            DataError: naming the first file that differs.
        """
        for entry in [*self._files, self._examples_file]:
            self._check_size(entry)
            self._check_content(entry)

    def _check_content(self, entry: dict[str, Any]) -> None:
        path = self.folder / entry["file"]
        found = _sha256(path)
        if found != entry["sha256"]:
            raise DataError(
                "a file of the token store is damaged",
                where=path,
                got=f"sha256 {found}",
                expected=f"sha256 {entry['sha256']}",
                fix="prepare the data again",
            )

    def _locate(self, example: int) -> tuple[Shard, int]:
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of {len(self)}")
        number = bisect_right(self._starts, example) - 1
        return self._shard(number), example - self._starts[number]

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = self._open_shard(number)
        return shard

    def _open_shard(self, number: int) -> Shard:
        """Map a shard. Its bytes are compared with the index first: training on a changed file must not begin."""
        entry = self._files[number]
        self._check_content(entry)
        shard = Shard(self._map(entry))
        lengths = self.lengths[self._starts[number] : self._starts[number + 1]]
        if not np.array_equal(np.diff(shard.offsets), lengths):
            raise DataError(
                "a shard of the token store does not hold the lengths that the store states",
                where=self.folder / entry["file"],
                fix="prepare the data again",
            )
        return shard

    def _check_size(self, entry: dict[str, Any]) -> None:
        path = self.folder / entry["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            raise DataError(
                "a file of the token store is missing" if size is None else "a file of the token store is truncated",
                where=path,
                got="no file" if size is None else f"{size} bytes",
                expected=f"{entry['bytes']} bytes",
                fix="prepare the data again",
            )

    def _map(self, entry: dict[str, Any]) -> pa.RecordBatch:
        path = self.folder / entry["file"]
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batch = reader.get_batch(0)
            batch.validate()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                "a file of the token store is damaged", where=path, got=error, fix="prepare the data again"
            ) from error
        if batch.num_rows != entry.get("examples"):
            raise DataError(
                "a file of the token store is damaged",
                where=path,
                got=f"{batch.num_rows} examples",
                expected=f"{entry.get('examples')} examples",
                fix="prepare the data again",
            )
        return batch


class Shard:
    """The mapped columns of one shard: ``tokens`` int32 and ``weights`` float32 flat, example i at ``offsets[i]``."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        tokens, weights = batch.column("tokens"), batch.column("weights")
        self.offsets = tokens.offsets.to_numpy()
        self.tokens = tokens.values.to_numpy()
        self.weights = weights.values.to_numpy()
        self.row_ids = batch.column("row_id")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            "not a token store: it has no index, so it was never finished", where=folder, fix="prepare the data again"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            "the index of the token store cannot be read", where=path, got=error, fix="prepare the data again"
        ) from error
    stated = (index.get("format"), index.get("version")) if isinstance(index, dict) else (None, None)
    if stated != (FORMAT, VERSION):
        raise DataError(
            "a token store of another format",
            where=path,
            got=f"{stated[0]} version {stated[1]}",
            expected=f"{FORMAT} version {VERSION}",
            fix="prepare the data again",
        )
    digest = index.pop("sha256", None)
    if digest != digest_value(index):
        raise DataError(
            "the index of the token store is damaged",
            where=path,
            got=f"sha256 {digest_value(index)} of what it says",
            expected=f"sha256 {digest}",
            fix="prepare the data again",
        )
    return index


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
