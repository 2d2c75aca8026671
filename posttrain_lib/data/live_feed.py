"""Units out of raw rows, tokenised by worker processes while training runs. For data that must be fresh.

The stream of tokens is the one that a prepared token store gives with the same window, seed and mixture: order, units
and packing are the same functions of (file, row). Every rank reads and tokenises everything and builds its own rows;
what it saves is the preparation, not the work of several ranks.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.assemble import PackedArrays, Segments, assemble
from posttrain_lib.data.encoding import EncodedRow, Example, encode_rows, make_live_encoder, name_rows
from posttrain_lib.data.live_rows import At, LiveFile
from posttrain_lib.data.live_stream import LiveStream, LiveUnit, Pool
from posttrain_lib.data.mixture import Mixer, Part
from posttrain_lib.data.order import source_seed
from posttrain_lib.data.packing import Rows
from posttrain_lib.data.planner import UnitFacts
from posttrain_lib.data.sources import is_local, look_of, names_of
from posttrain_lib.data.store_feed import SourceShare, plain_mixture, schedule
from posttrain_lib.data.workers import OrderedPool
from posttrain_lib.errors import CheckpointError, DataError
from posttrain_lib.schema.batches import PackedBatch

if TYPE_CHECKING:
    from posttrain_lib.config.data import DataConfig

QUARANTINE = "live_quarantine.jsonl"
#: names of this many examples are remembered for error messages
_NAMES_KEPT = 65_536
#: of the data section: what a row becomes depends on these, and on what :func:`_deciding` adds
_DECIDING = ("trained_turns", "train_on", "control_tokens", "max_example_tokens", "over_length")
#: rows of a source before its share of refused ones is judged
_ROWS_TO_JUDGE = 1000


@dataclass(frozen=True)
class LiveSpec:
    """What is read: plain and picklable.

    ``config`` is a DataConfig with ``chat_template`` a path of this machine or None. ``files`` has per source, in the
    config's order, its (path, digest of the content) in the order of reading. ``fingerprint`` says which tokenizer
    and template the prepared held-out examples were made with.
    """

    config: DataConfig
    tokenizer_folder: str
    files: tuple[tuple[tuple[str, str], ...], ...]
    fingerprint: Mapping[str, str]


class LiveFeed:
    """See :class:`~posttrain_lib.data.planner.Feed`.

    Args:
        window: rows are shuffled within windows of this many. epochs: passes over the files; None = without end.
        mixture: as for a StoreFeed, with a weight for every source, whole epochs and no cap: sizes are not known.
        workers: processes that tokenise; 0 = in the caller's thread.
        quarantine: folder for refused rows; None = they are only counted.

    Raises:
        DataError: a file cannot be read; too many rows are refused (while reading).
    """

    def __init__(
        self,
        spec: LiveSpec,
        *,
        row_tokens: int,
        window: int,
        seed: int = 0,
        epochs: int | None = None,
        share_prefixes: bool = True,
        mixture: Any = None,
        workers: int = 0,
        quarantine: Path | None = None,
    ) -> None:
        self._spec, self._limit = spec, spec.config.max_refused_fraction
        self.sources = [source.name for source in spec.config.sources]
        self._quarantine = None if quarantine is None else Quarantine(quarantine / QUARANTINE)
        self._units: dict[int, tuple[int, LiveUnit]] = {}  # drawn or looked at, not released: (stream, unit)
        self._next_id = 0
        self._last_refused = ""
        self._is_placed = False  # whether the quarantine has been brought to where reading starts
        self._names: OrderedDict[int, str] = OrderedDict()
        self._next_example = 0
        self._pool: Pool = OrderedPool(
            workers, make_live_encoder, (spec.config, spec.tokenizer_folder), encode_rows, name_rows
        )
        files = [
            [
                # A disk tells at no cost how a file looks; of a store's file its digest does.
                LiveFile(source, number, path, digest, name, look_of(path) if is_local(path) else digest)
                for number, ((path, digest), name) in enumerate(
                    zip(found, names_of([path for path, _ in found]), strict=True)
                )
            ]
            for source, found in enumerate(spec.files)
        ]
        self._identity = {
            "files": {
                f"{self.sources[file.source]} {file.number} {file.name}": file.digest
                for found in files
                for file in found
            },
            "made_by": dict(spec.fingerprint),
            "data": _deciding(spec.config),
            "seed": seed,
            "window": window,
            "share_prefixes": share_prefixes,
            "mixture": plain_mixture(mixture),
        }
        make = partial(LiveStream, pool=self._pool, window=window, row_tokens=row_tokens, share_prefixes=share_prefixes)
        parts = []
        groups = (
            [("", [file for found in files for file in found])]
            if mixture is None
            else list(zip(self.sources, files, strict=True))
        )
        self._streams: list[LiveStream] = []
        for number, (name, members) in enumerate(groups):
            share = SourceShare(weight=1.0, epochs=epochs) if mixture is None else mixture.sources[name]
            policy = (
                ("repeat" if epochs is None else "stop") if mixture is None else share.exhausted or mixture.exhausted
            )
            passes = share.epochs if policy == "repeat" or mixture is None else share.epochs or 1
            stream = make(
                members,
                seed=seed if mixture is None else source_seed(seed, name),
                epochs=None if policy == "repeat" or passes is None else int(passes),
                new_ids=partial(self._register, number),
                moved_past=partial(self._passed, number),
            )
            self._streams.append(stream)
            parts.append(Part(_Held(stream, partial(self._oldest, number)), schedule(share.weight), policy))
        self.mixer = Mixer(parts, by="samples" if mixture is None else mixture.by)
        self.warm()

    def identity(self) -> dict[str, Any]:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        return self._identity

    def facts(self, units: np.ndarray) -> UnitFacts:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        found = [self._units[unit][1] for unit in units.tolist()]
        return UnitFacts(
            weight=np.array([_weight(unit) for unit in found], np.float64),
            tokens=np.array([unit.tokens for unit in found], np.int64),
            pairs=np.array([_pairs(unit) for unit in found], np.float64),
            source=np.array([unit.source for unit in found], np.int32),
        )

    def names(self, units: Sequence[int]) -> list[Any]:
        """[stream, epoch, window, number, part] of each."""
        found = [self._units[unit] for unit in units]
        return [[stream, *unit.at, unit.part] for stream, unit in found]

    def load(self, mixer: dict[str, Any], names: Sequence[Any]) -> list[int]:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        self._units.clear()
        wanted: list[list[tuple[At, int]]] = [[] for _ in self._streams]
        for stream, epoch, window, number, part in names:
            wanted[stream].append((At(epoch, window, number), part))
        self._place_quarantine([At(*saved["at"]) for saved in mixer["streams"]])
        self.mixer.load_state({**mixer, "streams": list(zip(mixer["streams"], wanted, strict=True))})
        held = {(stream, unit.at, unit.part): number for number, (stream, unit) in self._units.items()}
        try:
            return [held[stream, At(*place), part] for stream, *place, part in names]
        except KeyError as error:
            raise CheckpointError(
                "a row that waited when the checkpoint was made gives nothing now",
                where=f"data position, {error}",
                fix="resume with the data and the settings that the checkpoint was made with, or start anew",
            ) from error

    def pack(self, rows: Rows, row_tokens: int, rows_per_batch: int) -> list[PackedBatch]:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        found = [[self._units[unit][1] for unit in row] for row in rows]
        pieces = [
            (unit.source, example, skipped)
            for row in found
            for unit in row
            for example, skipped in zip(unit.examples, unit.skipped, strict=True)
        ]
        segments = Segments(
            examples=np.array([self._remember(source, example.row_id) for source, example, _ in pieces], np.int64),
            lengths=np.array([len(example.ids) - skipped for _, example, skipped in pieces], np.int32),
            firsts=np.array([skipped for _, _, skipped in pieces], np.int32),
            sources=np.array([source for source, _, _ in pieces], np.int32),
            per_row=np.array([sum(len(unit.examples) for unit in row) for row in found], np.int64),
            margins=_margins([example for _, example, _ in pieces]),
        )

        def fill(places: np.ndarray, into: PackedArrays) -> None:
            if not pieces:
                return
            tokens = np.concatenate([example.ids[skipped:] for _, example, skipped in pieces])
            weights = np.concatenate([example.weights[skipped:] for _, example, skipped in pieces])
            begins = np.cumsum(segments.lengths, dtype=np.int64) - segments.lengths
            into.lay_out(tokens, weights, begins, segments.lengths, segments.firsts, places)

        return assemble(segments, fill, row_tokens, rows_per_batch)

    def release(self, units: np.ndarray) -> None:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        for unit in units.tolist():
            del self._units[unit]

    def name_example(self, example: int) -> str:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        return self._names.get(example, f"example {example} of this process")

    def consumed(self, state: dict[str, Any]) -> None:
        """Training is over at a loader's ``state``: drop refused rows that were read ahead of it."""
        self._place_quarantine([At(*saved["at"]) for saved in state["mixer"]["streams"]])

    def _place_quarantine(self, positions: Sequence[At]) -> None:
        self._is_placed = True
        if self._quarantine is not None:
            self._quarantine.go_to(positions)

    def warm(self, *, wait: bool = False) -> None:
        """Load the tokenizer where it will be used: that takes seconds, and the first step should not wait for it."""
        self._pool.warm(wait=wait)

    def close(self) -> None:
        """Stop the worker processes; they are started again when needed."""
        self._pool.close()

    def _register(self, stream: int, units: Sequence[LiveUnit]) -> list[int]:
        ids = list(range(self._next_id, self._next_id + len(units)))
        self._next_id += len(units)
        self._units.update(zip(ids, ((stream, unit) for unit in units), strict=True))
        return ids

    def _oldest(self, stream: int) -> At | None:
        return min((unit.at for number, unit in self._units.values() if number == stream), default=None)

    def _remember(self, source: int, row_id: str) -> int:
        number = self._next_example
        self._next_example += 1
        self._names[number] = f"{self.sources[source]}: {row_id}"
        if len(self._names) > _NAMES_KEPT:
            self._names.popitem(last=False)
        return number

    def _passed(self, stream: int, at: At, row: EncodedRow) -> None:
        name = self.sources[row.source]
        if not self._is_placed:  # an attempt that left no checkpoint may have left lines
            self._place_quarantine([At(0, 0, 0)] * len(self._streams))
        # Once, not at every pass: the rows are the same ones.
        for row_id, reason, detail in [*([(row.row_id, *row.refused)] if row.refused else []), *row.left_out]:
            if self._quarantine is not None and at.epoch == 0:
                self._quarantine.add(stream, at, name, row_id, reason, detail, row.raw)
            self._last_refused = f"{name} {row_id}: {reason}: {detail}"
        counts = self._streams[stream].counts
        if counts["rows"] >= _ROWS_TO_JUDGE and counts["refused"] > self._limit * counts["rows"]:
            kept = "they are in the quarantine file" if self._quarantine is not None else "the first worker keeps them"
            raise DataError(
                f"{counts['refused']:,} of {counts['rows']:,} rows were refused",
                where=self._quarantine.path if self._quarantine is not None else name,
                got=f"the last one: {self._last_refused}",
                expected=f"at most {self._limit:.2%} (data.max_refused_fraction)",
                fix=f"mend or remove these rows in the source ({kept}), or raise that limit",
            )


def _margins(examples: Sequence[Example]) -> np.ndarray | None:
    said = [example.margin for example in examples]
    if all(margin is None for margin in said):
        return None
    return np.array([math.nan if margin is None else margin for margin in said], np.float32)


def _deciding(config: Any) -> dict[str, Any]:
    """The data settings that decide what a row becomes, JSON-ready."""
    held_out = config.held_out
    return {
        **{name: getattr(config, name) for name in _DECIDING},
        "template": config.template_variables,
        "held_out": [held_out.fraction, held_out.group_field, held_out.seed],
        "sources": [[source.name, source.format, dict(source.fields)] for source in config.sources],
    }


class Quarantine:
    """A file of the rows that were refused in the first pass, each once however often training is interrupted.

    Every line says where in its stream the row stands; going to a position drops what is not before it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, stream: int, at: At, source: str, row_id: str, reason: str, detail: str, row: Any) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {"stream": stream, "at": list(at), "source": source, "row_id": row_id, "reason": reason}
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(json.dumps({**record, "detail": detail, "row": row}, ensure_ascii=False, default=str) + "\n")

    def go_to(self, positions: Sequence[At]) -> None:
        """Keep the lines of rows before each stream's position."""
        if not self.path.exists():
            return
        kept = [line for line in self._whole_lines() if At(*line[1]["at"]) < positions[line[1]["stream"]]]
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_bytes(b"".join(line for line, _ in kept))
        os.replace(unfinished, self.path)

    def _whole_lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """A killed process may have left half a line, or half a character, at the end: its row is visited again."""
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [(line + b"\n", json.loads(line)) for line in lines]


@dataclass(frozen=True)
class _Held:
    """A stream whose state also covers units that were drawn and wait in the packer."""

    stream: LiveStream
    oldest: Any

    def peek(self) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`~posttrain_lib.data.streams.Stream`."""
        return self.stream.peek()

    def advance(self, count: int) -> None:
        """See :class:`~posttrain_lib.data.streams.Stream`."""
        self.stream.advance(count)

    def state(self) -> dict[str, Any]:
        """See :class:`~posttrain_lib.data.streams.Stream`."""
        return self.stream.state(self.oldest())

    def load_state(self, state: Any) -> None:
        """The state and the units that were drawn before it: see :meth:`LiveStream.load_state`."""
        saved, wanted = state
        self.stream.load_state(saved, wanted)


def _weight(unit: LiveUnit) -> float:
    return float(sum(float(example.weights[1:].sum(dtype=np.float64)) for example in unit.examples))


def _pairs(unit: LiveUnit) -> float:
    segments = [(len(example.ids) - skip, skip) for example, skip in zip(unit.examples, unit.skipped, strict=True)]
    return float(sum(length * (skip + length / 2.0) for length, skip in segments))
