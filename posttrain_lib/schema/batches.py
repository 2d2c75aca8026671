"""A packed row batch: several documents laid end to end on one axis, never attending to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PackedBatch:
    """Documents packed along T. Arrays are numpy as built by the loader, torch tensors after ``data.collate``.

    Shapes and dtypes (T packed tokens, n documents, N supervised positions):
        token_ids        int64 [T]
        target_ids       int64 [T]   the next token of the same document; 0 where there is none
        loss_weights     float32 [T] weight of predicting ``target_ids[t]`` at position t; 0 = not trained
        positions        int64 [T]   restart at 0 with each document
        cu_seqlens       int32 [n+1] document boundaries; padding, if any, is a last document of its own
        supervised_index int64 [N]   positions with a non-zero weight, found on the CPU so that the head never syncs
        document_sources int32 [n]   index into the store's source names; -1 for padding
        document_ids     int64 [n]   example index in the token store; -1 for padding
    ``max_seqlen`` is the longest document; ``real_tokens`` counts tokens that are not padding.
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

    def map(self, convert: Callable[[Any], Any]) -> PackedBatch:
        """The same batch with ``convert`` applied to every array (numpy -> torch, device moves)."""
        arrays = {name: convert(getattr(self, name)) for name in self.ARRAYS}
        return PackedBatch(**arrays, max_seqlen=self.max_seqlen, real_tokens=self.real_tokens)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return int(self.token_ids.shape[0])

    @property
    def weight(self) -> float:
        """Sum of the loss weights, in float64: this batch's share of the step's divisor."""
        return float(np.asarray(self.loss_weights, dtype=np.float64).sum())
