"""A packed row batch: several documents laid end to end on one axis, attending to nothing but what they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain_lib.schema.allowed_sets import AllowedSets
from posttrain_lib.schema.shared_prefix import SharedPrefixes


@dataclass(frozen=True)
class PackedBatch:
    """Documents packed along T. Arrays are numpy as built by the loader, torch tensors after ``data.collate``.

    Each of the n segments of a row is a whole document, or the rest of one whose beginning lies in the row already.
    Shapes and dtypes (T packed tokens, n segments, N supervised positions); what is int64* here is int32 in the
    loader's numpy arrays, half as much to write and to send, and becomes int64 where it becomes a tensor:
        token_ids        int64* [T]
        target_ids       int64* [T]  the next token of the same document; 0 where there is none
        loss_weights     float32 [T] weight of predicting ``target_ids[t]`` at position t; 0 = not trained
        positions        int64* [T]  places in the document: restart at 0 with each whole document, go on from the
                                     length of the shared beginning in a segment with a parent
        cu_seqlens       int32 [n+1] segment boundaries; padding, if any, lies behind them in documents of its own
        supervised_index int64* [N]  positions with a non-zero weight, found on the CPU so that the head never syncs
        document_sources int32 [n]   index into the store's source names; -1 for padding
        document_ids     int64 [n]   example index in the token store; -1 for padding
        parents          int32 [n]   the earlier segment whose path this one continues, -1 for a whole document; None
                                     where the batch has whole documents alone (see ``schema.shared_prefix``)
        margins          float32 [n] how much better the chosen one of the segment's pair is, in the unit of whoever
                                     judged, NaN where not said; None where no segment has one
    ``allowed`` says which tokens the supervised ones were drawn from, where that was not the whole vocabulary.
    ``signals`` are arrays that a loss adds to the batch (``losses.base.Loss.signals``).
    ``max_seqlen`` is the longest segment; ``real_tokens`` counts tokens that are not padding, shared ones once.
    ``prefixes`` is what attention needs to know of ``parents``. It is made with the batch, in the loader's thread, so
    that no batch with parents is without it; to change ``parents`` in a copy, set it to None. Where a batch's tokens
    lie over ranks (``parallel.context``), a rank's segments are pieces, and ``prefixes`` alone says what they continue.
    """

    token_ids: Any
    target_ids: Any
    loss_weights: Any
    positions: Any
    cu_seqlens: Any
    supervised_index: Any
    document_sources: Any
    document_ids: Any
    max_seqlen: int
    real_tokens: int
    parents: Any = None
    prefixes: SharedPrefixes | None = None
    margins: Any = None
    allowed: AllowedSets | None = None
    signals: Mapping[str, Any] = field(default_factory=dict)

    ARRAYS = (
        "token_ids",
        "target_ids",
        "loss_weights",
        "positions",
        "cu_seqlens",
        "supervised_index",
        "document_sources",
        "document_ids",
    )

    def __post_init__(self) -> None:
        """Work out ``prefixes``; raises DataError where ``parents`` and ``positions`` do not fit each other."""
        if self.parents is None:
            if self.prefixes is not None and self.prefixes.exchange is None:
                object.__setattr__(self, "prefixes", None)
        elif self.prefixes is None:
            prefixes = SharedPrefixes.of(self.cu_seqlens, self.positions, self.parents)
            object.__setattr__(self, "prefixes", prefixes)

    def map(self, convert: Callable[[Any], Any]) -> PackedBatch:
        """The same batch with ``convert`` applied to every array (numpy -> torch, device moves)."""
        arrays = {name: convert(getattr(self, name)) for name in self.ARRAYS}
        optional = {"parents": self.parents, "margins": self.margins}
        arrays.update({name: convert(array) for name, array in optional.items() if array is not None})
        if self.prefixes is not None:
            arrays.update(prefixes=self.prefixes.map(convert))
        if self.allowed is not None:
            arrays.update(allowed=self.allowed.map(convert))
        arrays.update(signals={name: convert(array) for name, array in self.signals.items()})
        return PackedBatch(**arrays, max_seqlen=self.max_seqlen, real_tokens=self.real_tokens)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return int(self.token_ids.shape[0])

    @property
    def weight(self) -> float:
        """Sum of the loss weights, in float64: this batch's share of the step's divisor."""
        return float(np.asarray(self.loss_weights, dtype=np.float64).sum())
