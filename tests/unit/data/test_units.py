"""Units: what may be parted, what a shared prefix saves; and packed as units, the documents are whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain_lib.data.packing import Rows
from posttrain_lib.data.store_feed import StoreFeed
from posttrain_lib.data.token_store import TokenStore, TokenStoreWriter
from posttrain_lib.data.units import LEAST_SHARED, units_of
from posttrain_lib.errors import DataError
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.examples import TokenizedExample

PREFIX = 2 * LEAST_SHARED


def _store(folder: Path, rows: list[list[tuple[int, int]]], kind: str = "document") -> TokenStore:
    """Rows of (length, tokens shared with the document before it)."""
    number = 0
    with TokenStoreWriter(folder) as writer:
        for row, documents in enumerate(rows):
            before = np.zeros(0, np.int32)
            for length, shared in documents:
                number += 1
                tokens = np.concatenate([before[:shared], np.full(length - shared, number)]).astype(np.int32)
                weights = (np.arange(length) > shared).astype(np.float32)
                example = TokenizedExample(tokens, weights, "s", f"r:{row}")
                writer.add(example, kind=kind, shared=shared, row=(0, row))
                before = tokens
    return TokenStore(folder)


def test_documents_that_share_enough_form_a_unit_as_far_as_they_fit(tmp_path: Path) -> None:
    rows = [
        [(40, 0)],
        [(50, 0), (60, PREFIX), (70, PREFIX)],
        [(50, 0), (60, LEAST_SHARED - 1)],
        [(90, 0), (100, PREFIX)],
    ]
    store = _store(tmp_path, rows)
    units = units_of(store, 120, share_prefixes=True)
    # 50 + 28 fit into 120, the 38 of the third do as well; 90 + 68 do not, so the last document stands alone and whole.
    assert units.first.tolist() == [0, 1, 4, 5, 6, 7]
    assert units.count.tolist() == [1, 3, 1, 1, 1, 1]
    assert units.lengths.tolist() == [40, 50 + 28 + 38, 50, 60, 90, 100]
    alone = units_of(store, 120, share_prefixes=False)
    assert alone.lengths.tolist() == store.lengths.tolist() and alone.count.max() == 1


def test_pairs_are_never_parted(tmp_path: Path) -> None:
    store = _store(tmp_path, [[(50, 0), (60, PREFIX)], [(20, 0), (30, 0)]], kind="pair")
    for share, lengths in [(True, [78, 50]), (False, [110, 50])]:
        units = units_of(store, 128, share_prefixes=share)
        assert units.count.tolist() == [2, 2] and units.lengths.tolist() == lengths
    with pytest.raises(DataError, match="pair is longer") as caught:
        units_of(store, 100, share_prefixes=False)
    assert "r:0" in str(caught.value) and "110 tokens" in str(caught.value)
    assert units_of(store, 100, share_prefixes=True).lengths.max() == 78


def test_what_is_longer_than_a_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="example is longer") as caught:
        units_of(_store(tmp_path, [[(5, 0)], [(9, 0)]]), 8, share_prefixes=True)
    assert "r:1" in str(caught.value)


def _documents(batch: PackedBatch) -> dict[int, tuple[list[int], list[int]]]:
    """Example id -> (its tokens, its targets where it has a weight), walking from each segment up to its root."""
    bounds = batch.cu_seqlens.tolist()
    parents = [-1] * (len(bounds) - 1) if batch.parents is None else batch.parents.tolist()
    paths: list[list[int]] = []
    found = {}
    for segment, parent in enumerate(parents):
        begin, end = bounds[segment], bounds[segment + 1]
        first = int(batch.positions[begin])
        assert batch.positions[begin:end].tolist() == list(range(first, first + end - begin))
        path = (paths[parent][:first] if parent >= 0 else []) + list(range(begin, end))
        paths.append(path)
        if batch.document_ids[segment] >= 0:
            trained = [int(batch.target_ids[t]) for t in path if batch.loss_weights[t] > 0 and t >= begin]
            found[int(batch.document_ids[segment])] = ([int(batch.token_ids[t]) for t in path], trained)
    return found


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(20, 60), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=12
    ),
    share=st.booleans(),
    order_seed=st.integers(0, 5),
)
def test_every_document_can_be_read_out_of_its_row_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[tuple[int, int]]], share: bool, order_seed: int
) -> None:
    fitted = []
    for row in rows:
        documents, before = [], 0
        for length, shared in row:
            documents.append((length, min(shared, length - 2, before - 1) if before > 2 else 0))
            before = length
        fitted.append(documents)
    store = _store(tmp_path_factory.mktemp("store"), fitted)
    feed = StoreFeed(store, row_tokens=160, seed=order_seed, share_prefixes=share)
    units = feed.units
    chosen = np.random.default_rng(order_seed).permutation(len(units)).tolist()
    packed: list[tuple[int, ...]] = [()]
    room = 160
    for unit in chosen:
        if units.lengths[unit] > room:
            packed, room = [*packed, ()], 160
        packed[-1] = (*packed[-1], unit)
        room -= int(units.lengths[unit])
    found = _documents(feed.pack(Rows.of(packed), 160, len(packed))[0])
    assert sorted(found) == list(range(len(store)))
    for example, (tokens, trained) in found.items():
        ids, weights = store.get(example)
        assert tokens == ids.tolist()
        assert trained == ids[1:][weights[1:] > 0].tolist()
    assert units.lengths.sum() <= store.lengths.sum()
    assert share or units.lengths.sum() == store.lengths.sum()
