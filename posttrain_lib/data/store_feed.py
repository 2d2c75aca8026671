"""Units of a token store, in the order and the mixture that a run asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_lib.data.assemble import assemble, segments_of, store_filler
from posttrain_lib.data.mixture import Mixer, Part, natural_weight
from posttrain_lib.data.order import epoch_permutation, row_keys, source_seed, windowed_order
from posttrain_lib.data.packing import Rows
from posttrain_lib.data.planner import UnitFacts
from posttrain_lib.data.streams import StoreStream
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.data.units import Units, units_of
from posttrain_lib.errors import ConfigError, DataError
from posttrain_lib.schema.batches import PackedBatch

if TYPE_CHECKING:
    from posttrain_lib.config.train import TrainConfig

#: a schedule [(step, weight), ...], a constant, or None for the source's size
Weight = Any


@dataclass(frozen=True)
class SourceShare:
    """One source's part of a :class:`MixtureSpec`; the fields are those of the config's MixedSource."""

    weight: Weight = None
    epochs: float | None = None
    max_examples: int | None = None
    exhausted: str | None = None


@dataclass(frozen=True)
class MixtureSpec:
    """A mixture as plain values; the fields are those of the config's Mixture."""

    by: str = "samples"
    temperature: float = 1.0
    exhausted: str = "repeat"
    sources: Mapping[str, SourceShare] = field(default_factory=dict)


class StoreFeed:
    """See :class:`~posttrain_lib.data.planner.Feed`.

    Args:
        row_tokens: length of a packed row; documents that share a prefix form one unit as far as they fit into it.
        epochs: passes over the store, may be a fraction; None = without end. With a mixture: a matter of its sources.
        window: shuffle within windows of this many rows, else over the whole store.
        mixture: a MixtureSpec, or the config's Mixture; None = every unit is as likely as any other.

    Raises:
        DataError: the store has nothing to train on, or a unit is longer than a row.
        ConfigError: the mixture names an unknown source, weighs some sources only, or has no weight above 0.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        row_tokens: int,
        seed: int = 0,
        epochs: float | None = None,
        window: int | None = None,
        share_prefixes: bool = True,
        mixture: Any = None,
    ) -> None:
        check_trainable(store)
        _check_names(mixture, store)
        self._store, self._seed, self._window = store, seed, window
        self._units = units_of(store, row_tokens, share_prefixes=share_prefixes)
        self.sources = store.sources
        self._unit_source = store.source_index[self._units.first]
        self._weights = np.add.reduceat(store.weight_sums, self._units.first)
        #: (source, examples, passes over them) of every source that runs dry
        self.supplies: list[tuple[str, int, float]] = []
        self._identity = {
            "store": store.digest,
            "store_files": store.file_digests,
            "seed": seed,
            "window": window,
            "share_prefixes": share_prefixes,
            "mixture": plain_mixture(mixture),
        }
        if mixture is None:
            stream = self._stream(np.arange(len(self._units)), seed, epochs)
            policy = "repeat" if epochs is None else "stop"
            if epochs is not None:
                counts = np.bincount(store.source_index, minlength=len(self.sources)).tolist()
                self.supplies = [(name, count, epochs) for name, count in zip(self.sources, counts, strict=True)]
            self.mixer = Mixer([Part(stream, ((1, 1.0),), policy)], by="samples")
        else:
            self.mixer = Mixer([self._part(name, mixture) for name in self.sources], by=mixture.by)

    @property
    def units(self) -> Units:
        """All units of the store."""
        return self._units

    def identity(self) -> dict[str, Any]:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        return self._identity

    def facts(self, units: np.ndarray) -> UnitFacts:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        return UnitFacts(
            weight=self._weights[units],
            tokens=self._units.lengths[units].astype(np.int64),
            pairs=self._units.pairs[units],
            source=self._unit_source[units],
        )

    def names(self, units: Sequence[int]) -> list[Any]:
        """Units of a store are known by their numbers."""
        return list(units)

    def load(self, mixer: dict[str, Any], names: Sequence[Any]) -> list[int]:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        self.mixer.load_state(mixer)
        return [int(name) for name in names]

    def pack(self, rows: Rows, row_tokens: int, rows_per_batch: int) -> list[PackedBatch]:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        segments = segments_of(self._store, self._units, rows)
        return assemble(segments, store_filler(self._store, segments), row_tokens, rows_per_batch)

    def release(self, units: np.ndarray) -> None:
        """Nothing is held."""

    def name_example(self, example: int) -> str:
        """See :class:`~posttrain_lib.data.planner.Feed`."""
        return f"{self._store.source(example)}: {self._store.row_id(example)}"

    def close(self) -> None:
        """Nothing works beside."""

    def _part(self, name: str, mixture: Any) -> Part:
        share = mixture.sources.get(name) or SourceShare()
        members = np.flatnonzero(self._unit_source == self.sources.index(name))
        seed = source_seed(self._seed, name)
        if share.max_examples is not None and share.max_examples < len(members):
            keys = self._keys(members, seed)
            members = np.sort(members[np.argsort(keys, kind="stable")[: share.max_examples]])
        policy = share.exhausted or mixture.exhausted
        epochs = None if policy == "repeat" else (share.epochs or 1.0)
        if epochs is not None:
            self.supplies.append((name, int(self._units.count[members].sum()), epochs))
        stream = self._stream(members, seed, epochs)
        size = int(self._units.lengths[members].sum()) if mixture.by == "tokens" else len(members)
        weight = natural_weight(size, mixture.temperature) if share.weight is None else schedule(share.weight)
        return Part(stream, weight, policy)

    def _keys(self, units: np.ndarray, seed: int) -> np.ndarray:
        """By the row, not by the number in the store: which examples a cap keeps must not hang on the others."""
        first = self._units.first[units]
        return row_keys(self._store.file_index[first], self._store.row_index[first], seed, -1)

    def _stream(self, members: np.ndarray, seed: int, epochs: float | None) -> StoreStream:
        return StoreStream(
            self._order(members, seed),
            self._units.lengths,
            limit=None if epochs is None else max(1, round(len(members) * epochs)),
        )

    def _order(self, members: np.ndarray, seed: int) -> Callable[[int], np.ndarray]:
        if self._window is None:
            return partial(_permuted, members, seed)
        file, row, rows = self._places(members)
        return partial(_windowed, members, file, row, rows, self._window, seed)

    def _places(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(file, row, rows of each file) of units, the files of all their sources numbered through.

        Without a mixture a source that gave no example still has its files in the sequence: they are read.
        """
        store, first = self._store, self._units.first[members]
        sources = store.source_index[first]
        present = {store.sources[number] for number in np.unique(sources).tolist()}
        stated = store.source_files if len(members) == len(self._units) else {}
        names = [*stated, *(name for name in store.sources if name in present and name not in stated)]
        base: dict[str, int] = {}
        counts: list[int] = []
        for name in names:
            base[name] = len(counts)
            counts += [rows for _, rows in store.source_files.get(name, [])] or self._rows_seen(first, sources, name)
        offsets = np.array([base.get(name, 0) for name in store.sources])
        return store.file_index[first] + offsets[sources], store.row_index[first], np.array(counts, np.int64)

    def _rows_seen(self, first: np.ndarray, sources: np.ndarray, name: str) -> list[int]:
        """Rows of each file of a source of which the store states none: up to the last that gave something."""
        mine = sources == self._store.sources.index(name)
        files, rows = self._store.file_index[first][mine], self._store.row_index[first][mine]
        return [int(rows[files == file].max(initial=-1)) + 1 for file in range(int(files.max()) + 1)]


def feed_for(store: TokenStore, train: TrainConfig) -> StoreFeed:
    """The units of a store as a train section orders, mixes and joins them."""
    return StoreFeed(
        store,
        row_tokens=train.row_tokens,
        seed=train.seed,
        epochs=train.epochs,
        window=train.shuffle_window,
        share_prefixes=train.share_prefixes,
        mixture=train.mixture,
    )


def check_trainable(store: TokenStore) -> None:
    """Refuse a store without a trained token.

    Raises:
        DataError: naming the store.
    """
    if store.trained_tokens == 0:
        raise DataError(
            "the token store has nothing to train on",
            where=store.folder,
            got=f"{len(store)} examples, none with a weight above 0",
            fix="look at the receipt and the quarantine of the prepared data",
        )


def _check_names(mixture: Any, store: TokenStore) -> None:
    """A source of which nothing was kept is in no store; one that never was is a slip."""
    unknown = sorted(set(mixture.sources if mixture is not None else ()) - {*store.sources, *store.source_files})
    if unknown:
        raise ConfigError(
            "the mixture names a source that the data does not have",
            where="train.mixture.sources",
            got=", ".join(unknown),
            expected=", ".join(store.sources),
        )
    weighed = {name for name in store.sources if mixture is not None and _weight_of(mixture, name) is not None}
    if weighed and weighed != set(store.sources):
        raise ConfigError(
            "some sources of the mixture have a weight and others have not: sizes and weights are no common measure",
            where="train.mixture.sources",
            got=f"a weight for {', '.join(sorted(weighed))}",
            expected=f"one for each of {', '.join(store.sources)}, or for none",
        )


def _weight_of(mixture: Any, name: str) -> Any:
    share = mixture.sources.get(name)
    return None if share is None else share.weight


def plain_mixture(mixture: Any) -> dict[str, Any] | None:
    """A mixture as JSON-ready values, to be compared with a checkpoint's."""
    if mixture is None:
        return None
    sources = {
        name: {
            "weight": None if share.weight is None else [list(point) for point in schedule(share.weight)],
            "epochs": share.epochs,
            "max_examples": share.max_examples,
            "exhausted": share.exhausted,
        }
        for name, share in mixture.sources.items()
    }
    return {
        "by": mixture.by,
        "temperature": mixture.temperature,
        "exhausted": mixture.exhausted,
        "sources": sources,
    }


def schedule(weight: Any) -> tuple[tuple[int, float], ...]:
    """A weight as a schedule [(step, weight), ...]."""
    if isinstance(weight, int | float):
        return ((1, float(weight)),)
    return tuple((int(step), float(value)) for step, value in weight)


def _permuted(members: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    return members[epoch_permutation(len(members), seed, epoch)]


def _windowed(
    members: np.ndarray, file: np.ndarray, row: np.ndarray, rows: np.ndarray, window: int, seed: int, epoch: int
) -> np.ndarray:
    return members[windowed_order(file, row, rows, window, seed, epoch)]
