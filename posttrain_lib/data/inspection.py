"""A prepared data set looked at row by row: messages, tokens with their weights, and the packed row each lies in.

Nothing here prints: what is found comes back as plain values, for a terminal or a page to show.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.formats import get_format
from posttrain_lib.data.inspection_view import (
    OWN_ID,
    Pack,
    Said,
    ShownDocument,
    ShownRow,
    locate,
    own_id,
    said_in,
    spell,
)
from posttrain_lib.data.making import make
from posttrain_lib.data.prepare import HELD_OUT, QUARANTINE, TRAIN
from posttrain_lib.data.readers import BadRow, Place
from posttrain_lib.data.refusal import RefusedRow
from posttrain_lib.data.sources import files_of, names_of, read_from
from posttrain_lib.data.token_store import INDEX_FILE, KINDS, TokenStore
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.schema.examples import ParsedRow

if TYPE_CHECKING:
    from posttrain_lib.config.data import DataConfig
    from posttrain_lib.config.train import TrainConfig
    from posttrain_lib.data.chat_tokenizer import ChatTokenizer

REFUSED = "refused"
#: ids that an error names
_SUGGESTIONS = 3


@dataclass(frozen=True)
class Found:
    """A row that was chosen: examples of a store, or a record of the quarantine; ``only`` one of its documents."""

    split: str
    source: str
    row_id: str
    examples: tuple[int, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    only: str = ""


class Inspection:
    """A prepared data set, opened for looking.

    Args:
        folder: what the preparation left; of one that stopped, only the quarantine.
        data: the run's data section (``chat_template`` a path of this machine or None). train: its train section.
        inputs: source name -> path of its rows.

    Raises:
        DataError: there is nothing, or a file of it is damaged.
    """

    def __init__(
        self,
        folder: Path,
        data: DataConfig,
        train: TrainConfig,
        tokenizer: ChatTokenizer,
        inputs: Mapping[str, str],
    ) -> None:
        self._folder, self._data, self._train = folder, data, train
        self._tokenizer, self._inputs = tokenizer, inputs
        self._stores = {
            name: TokenStore(folder / name) for name in (TRAIN, HELD_OUT) if (folder / name / INDEX_FILE).is_file()
        }
        if not self._stores and not (folder / QUARANTINE).is_file():
            raise DataError("nothing was prepared here", where=folder, fix="prepare the data")

    def row(self, name: str) -> list[Found]:
        """The rows of that id, as receipts print it, with or without the source and a document's suffix.

        Raises:
            DataError: there is none; it names the nearest.
        """
        for source, row_id in self._readings(name.strip()):
            found = self._stored(source, row_id)
            for record in self._quarantined(source, row_id):
                whole = self._stored(record["source"], own_id(record["row_id"]))
                # A part of a row of which other parts are in a store is shown with them.
                found = found or whole if whole else [*found, _refusal(record)]
            if found:
                return found
        raise self._unknown(name.strip())

    def example(self, number: int, split: str = TRAIN) -> list[Found]:
        """The row of a store's example, counted from 0 as in a batch's ``document_ids``."""
        store = self._store(split)
        if not 0 <= number < len(store):
            raise DataError(
                f"the {split} store has no example {number}", where=store.folder, expected=f"0 to {len(store) - 1}"
            )
        return self._rows_of(split, [number])

    def random(self, count: int, split: str = TRAIN, seed: int = 0) -> list[Found]:
        """Rows drawn at random, a row with more documents not more often."""
        starts = self._row_starts(split)
        drawn = np.random.default_rng(seed).permutation(len(starts))[:count]
        return self._rows_of(split, starts[drawn].tolist())

    def longest(self, count: int, split: str = TRAIN) -> list[Found]:
        """Rows with the longest documents, longest first."""
        starts, lengths = self._row_starts(split), self._store(split).lengths
        longest = np.maximum.reduceat(lengths, starts) if len(starts) else np.zeros(0)
        return self._rows_of(split, starts[np.argsort(-longest, kind="stable")[:count]].tolist())

    def refused(self, reason: str | None, most: int) -> tuple[list[Found], Counter[str]]:
        """The first refused rows (of one reason), and how many there are of every reason.

        Raises:
            DataError: nothing was refused for that reason; it lists those there are.
        """
        found: list[Found] = []
        counts: Counter[str] = Counter()
        for record in self._records():
            counts[record["reason"]] += 1
            if reason in (None, record["reason"]) and len(found) < most:
                found.append(_refusal(record))
        if reason is not None and not counts[reason]:
            near = difflib.get_close_matches(reason, counts, n=1)
            raise DataError(
                f"nothing was refused as {reason!r}",
                where=self._folder / QUARANTINE,
                expected=", ".join(f"{name} ({count:,})" for name, count in counts.most_common()) or "nothing: no row",
                fix=f"is {near[0]!r} meant?" if near else None,
            )
        return found, counts

    def show(self, rows: Sequence[Found]) -> list[ShownRow]:
        """Everything about rows: read again from their source, spelt, and found in the plan of training."""
        refusals = self._refusals_of(rows)
        wanted = {example for row in rows if row.split == TRAIN for example in row.examples}
        packs, note = self._packs(wanted)
        return [
            self._show_refused(row)
            if row.split == REFUSED
            else self._show_stored(row, packs, note, refusals.get((row.source, row.row_id), ()))
            for row in rows
        ]

    def _show_refused(self, row: Found) -> ShownRow:
        record = row.record
        raw = record["row"] if record["row"] is not None else self._read_by_id(row.source, row.row_id)
        parsed = self._parsed(row, raw)
        refusal = (str(record["row_id"]), str(record["reason"]), str(record["detail"]))
        said = () if isinstance(parsed, RefusedRow) else said_in(parsed)
        return ShownRow(row.source, row.row_id, REFUSED, "", raw, said, refusals=(refusal,))

    def _show_stored(
        self, row: Found, packs: Mapping[int, Pack], note: str, refusals: tuple[tuple[str, str, str], ...]
    ) -> ShownRow:
        store = self._store(row.split)
        raw = self._read_again(store, row.examples[0])
        parsed = self._parsed(row, raw)
        shown = [self._document(store, example) for example in row.examples]
        warnings: tuple[str, ...] = ()
        if isinstance(parsed, RefusedRow):
            warnings = (f"the row is not what it was when it was prepared: {parsed}",)
            said: tuple[Said, ...] = ()
        else:
            said = said_in(parsed)
            shown, warnings = self._with_roles(parsed, row.row_id, shown)
        note = "held out: never trained" if row.split == HELD_OUT else note
        placed = [replace(item, pack=packs.get(item.example), pack_note=note) for item in shown]
        documents = tuple(item for item in placed if row.only in ("", item.row_id))
        kind = KINDS[int(store.kinds[row.examples[0]])]
        return ShownRow(row.source, row.row_id, row.split, kind, raw, said, documents, refusals, warnings)

    def _document(self, store: TokenStore, example: int) -> ShownDocument:
        ids, weights = store.get(example)
        counted = weights.copy()
        counted[:1] = 0.0
        special = np.isin(ids, list(self._tokenizer.special_ids))
        pieces = spell(self._tokenizer, ids.tolist())
        shared = int(store.shared[example])
        return ShownDocument(example, store.row_id(example), ids, counted, special, pieces, shared)

    def _with_roles(
        self, parsed: ParsedRow, row_id: str, shown: list[ShownDocument]
    ) -> tuple[list[ShownDocument], tuple[str, ...]]:
        """The documents with the role of every token, found by making them again; a warning where they differ."""
        try:
            made = {row_id + item.suffix: item.tokens for item in make(self._tokenizer, parsed, self._data).documents}
        except RefusedRow as refusal:
            return shown, (f"made again, the row is refused: {refusal}",)
        told, warnings = [], []
        for document in shown:
            tokens = made.get(document.row_id)
            if tokens is None or not np.array_equal(tokens.ids, document.ids):
                warnings.append(f"{document.row_id}: made again, its tokens are not those of the store")
                told.append(document)
                continue
            told.append(replace(document, roles=tuple(tokens.roles[part] for part in tokens.role_of.tolist())))
        return told, tuple(warnings)

    def _packs(self, wanted: set[int]) -> tuple[dict[int, Pack], str]:
        if not wanted:
            return {}, ""
        if self._data.on_the_fly:
            return {}, "tokenised on the fly in training: the prepared sample does not say what is packed with it"
        try:
            return locate(self._store(TRAIN), self._train, wanted)
        except (DataError, ConfigError) as error:  # the row can be looked at all the same; the reason is shown with it
            return {}, f"training would not start: {error.what}"

    def _parsed(self, row: Found, raw: Any) -> ParsedRow | RefusedRow:
        source = next(item for item in self._data.sources if item.name == row.source)
        if not isinstance(raw, Mapping):
            return RefusedRow("unreadable", str(raw)[:80])
        try:
            group = self._data.held_out.group_field
            return get_format(source.format)(raw, row.source, row.row_id, group, source.fields)
        except RefusedRow as refusal:
            return refusal

    def _read_again(self, store: TokenStore, example: int) -> Any:
        files = files_of(self._inputs[store.source(example)])
        place = Place(int(store.row_index[example]))
        for _, _, row in read_from(files[int(store.file_index[example])], place):
            return row.raw if isinstance(row, BadRow) else row
        return None

    def _read_by_id(self, source: str, row_id: str) -> Any:
        """A row that the quarantine names without keeping it: a duplicate."""
        name = row_id.rpartition(":")[0]
        files = files_of(self._inputs[source])
        for file, called in zip(files, names_of(files), strict=True):
            if called != name:
                continue
            for _, found, row in read_from(file, name=called):
                if found == row_id:
                    return row.raw if isinstance(row, BadRow) else row
        return None

    def _store(self, split: str) -> TokenStore:
        if split not in self._stores:
            raise DataError(
                "the preparation stopped, so no token store was finished: only refused rows can be looked at",
                where=self._folder,
                fix="look at them with --refused, mend them, and prepare again",
            )
        return self._stores[split]

    def _row_starts(self, split: str) -> np.ndarray:
        """int64: the first example of every row."""
        store = self._store(split)
        new = np.ones(len(store), bool)
        for column in (store.source_index, store.file_index, store.row_index):
            new[1:] &= column[1:] == column[:-1]
        new[1:] = ~new[1:]
        return np.flatnonzero(new)

    def _rows_of(self, split: str, examples: Sequence[int]) -> list[Found]:
        """The whole rows of examples, each once, in their order."""
        store, starts = self._store(split), self._row_starts(split)
        bounds = np.append(starts, len(store))
        found: dict[int, Found] = {}
        for example in examples:
            at = int(np.searchsorted(starts, example, side="right")) - 1
            members = tuple(range(int(bounds[at]), int(bounds[at + 1])))
            found.setdefault(at, Found(split, store.source(example), own_id(store.row_id(example)), members))
        return list(found.values())

    def _ids(self, split: str) -> Iterator[tuple[np.ndarray, Any]]:
        """(example numbers, their row ids as an Arrow column) of every shard."""
        store = self._stores[split]
        for chosen, shard, _ in store.shards_of(np.arange(len(store))):
            yield chosen, shard.row_ids

    def _stored(self, source: str | None, row_id: str) -> list[Found]:
        import pyarrow.compute as pc

        own, found = own_id(row_id), []
        for split, store in self._stores.items():
            hits = []
            for examples, ids in self._ids(split):
                near = np.flatnonzero(pc.starts_with(ids, own).to_numpy(zero_copy_only=False))
                hits += [
                    int(examples[at]) for at in near.tolist() if row_id in (ids[at].as_py(), own_id(ids[at].as_py()))
                ]
            hits = [example for example in hits if source in (None, store.source(example))]
            only = "" if row_id == own else row_id
            found += [replace(row, only=only) for row in self._rows_of(split, hits)]
        return found

    def _quarantined(self, source: str | None, row_id: str) -> list[dict[str, Any]]:
        return [
            record
            for record in self._records()
            if row_id in (record["row_id"], own_id(record["row_id"])) and source in (None, record["source"])
        ]

    def _refusals_of(self, rows: Sequence[Found]) -> dict[tuple[str, str], tuple[tuple[str, str, str], ...]]:
        wanted = {(row.source, row.row_id) for row in rows if row.split != REFUSED}
        found: dict[tuple[str, str], tuple[tuple[str, str, str], ...]] = {}
        for record in self._records() if wanted else ():
            key = record["source"], own_id(record["row_id"])
            if key in wanted:
                found[key] = (*found.get(key, ()), (record["row_id"], record["reason"], record["detail"]))
        return found

    def _records(self) -> Iterator[dict[str, Any]]:
        with open(self._folder / QUARANTINE, encoding="utf-8") as handle:
            for line in handle:
                yield json.loads(line)

    def _readings(self, name: str) -> list[tuple[str | None, str]]:
        """(source, row id) as which a name can be read."""
        readings: list[tuple[str | None, str]] = [(None, name)]
        for source in self._data.sources:
            rest = name.removeprefix(source.name)
            if rest != name and rest[:1] in (":", " "):
                readings.append((source.name, rest[1:].strip()))
        return readings

    def _unknown(self, name: str) -> DataError:
        """Names the nearest ids: of the file that is called most alike, the rows next to the number asked for."""
        source, row_id = self._readings(name)[-1]
        near = self._nearest(source, row_id)
        partly = " (only a sample of the rows is prepared: data.on_the_fly)" if self._data.on_the_fly else ""
        return DataError(
            f"no row of that id was prepared or refused{partly}",
            where=self._folder,
            got=name,
            expected=f"an id such as {' or '.join(near)}" if near else None,
            fix="ids are the source's file name and the row's number in it, as receipts and errors print them",
        )

    def _nearest(self, source: str | None, row_id: str) -> list[str]:
        file, _, number = own_id(row_id).rpartition(":")
        known: dict[str, set[int]] = {}
        for split, store in self._stores.items():
            for examples, ids in self._ids(split):
                for example, found in zip(examples.tolist(), ids.to_pylist(), strict=True):
                    if source in (None, store.source(example)):
                        _remember(known, found)
        for record in self._records():
            if source in (None, record["source"]):
                _remember(known, record["row_id"])
        for name in difflib.get_close_matches(file or row_id, known, n=1, cutoff=0.0):
            wanted = int(number) if number.isdecimal() else 0
            nearest = sorted(known[name], key=lambda other: (abs(other - wanted), other))[:_SUGGESTIONS]
            return [f"{name}:{other}" for other in sorted(nearest)]
        return []


def _refusal(record: Mapping[str, Any]) -> Found:
    return Found(REFUSED, record["source"], own_id(record["row_id"]), record=record)


def _remember(known: dict[str, set[int]], row_id: str) -> None:
    match = OWN_ID.fullmatch(row_id)
    if match is not None:
        known.setdefault(match.group(1).rpartition(":")[0], set()).add(int(match.group(2)))
