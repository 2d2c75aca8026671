"""The held-out loss of each document, gathered while the held-out loss is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from posttrain_lib.evaluation.bootstrap import Scores

if TYPE_CHECKING:
    from posttrain_lib.data.token_store import TokenStore
    from posttrain_lib.losses.base import LossOutput
    from posttrain_lib.schema.batches import PackedBatch


class DocumentLosses:
    """Sums loss and weight of the items of each example of a store; give it as ``held_out_loss``'s ``observe``.

    The examples are a document's, or a pair's first document's, in the store's order.
    """

    def __init__(self, store: TokenStore) -> None:
        self._names = list(store.sources)
        self._sums = np.zeros((len(store), 2))
        self._sources = np.zeros(len(store), dtype=np.int64)

    def __call__(self, batch: PackedBatch, output: LossOutput) -> None:
        """Add one batch's items."""
        documents_M = batch.document_ids[output.segments].cpu().numpy()
        weights_M = output.weights.double().cpu().numpy()
        np.add.at(self._sums[:, 0], documents_M, output.values.double().cpu().numpy() * weights_M)
        np.add.at(self._sums[:, 1], documents_M, weights_M)
        self._sources[documents_M] = batch.document_sources[output.segments].cpu().numpy()

    def scores(self, *, exponential: bool = False) -> Scores:
        """The mean loss of each example that has an item, weighed by its items and grouped by source."""
        kept = self._sums[:, 1] > 0
        sums, weights = self._sums[kept].T
        groups = tuple(self._names[source] for source in self._sources[kept])
        unit: Literal["nats", ""] = "" if exponential else "nats"
        return Scores(sums / weights, weights, groups, better="lower", unit=unit, exponential=exponential)
