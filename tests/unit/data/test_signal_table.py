"""Stored signals: each value comes back at its own document or token; tables of something else are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from posttrain_lib.data.signal_table import INDEX_FILE, SignalTable, SignalWriter
from posttrain_lib.data.token_store import TokenStore
from posttrain_lib.errors import DataError
from tests.oracles.tiny_job import pack_rows, write_store

ROWS = [[3, 1], [7], [0, 5, 2]]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore(write_store(tmp_path / "store", 12, seed=0))


def by_token(folder: Path, store: TokenStore) -> Path:
    """Two columns that name the example and the place of the token: [100 * example + n], and that twice, negated."""
    writer = SignalWriter(folder, store, "token", {"a": (np.int32, ()), "b": (np.float32, (2,))}, {"model": "m"})
    for example in reversed(range(len(store))):
        values = 100 * example + np.arange(store.trained_counts[example])
        writer.put(example, {"a": values, "b": -np.stack([values, values], axis=1)})
    writer.close()
    return folder


def test_by_token(tmp_path: Path, store: TokenStore) -> None:
    table = SignalTable(by_token(tmp_path / "table", store), store, {"model": "m"})
    batch = pack_rows(store, ROWS, 64)
    found = table.of_tokens(batch)
    expected = []
    for segment, example in enumerate(batch.document_ids.tolist()):
        inside = (batch.supervised_index >= batch.cu_seqlens[segment]) & (
            batch.supervised_index < batch.cu_seqlens[segment + 1]
        )
        assert example >= 0 or not inside.any()
        expected += [100 * example + number for number in range(int(inside.sum()))]
    assert found["a"].tolist() == expected
    assert found["b"].tolist() == [[-value, -value] for value in expected]


def test_by_example(tmp_path: Path, store: TokenStore) -> None:
    writer = SignalWriter(tmp_path / "table", store, "example", {"score": (np.float32, ())}, {"model": "m"})
    for example in range(len(store)):
        writer.put(example, {"score": np.float32(example + 0.5)})
    writer.close()
    batch = pack_rows(store, ROWS, 64)
    found = SignalTable(tmp_path / "table", store).of_segments(batch)["score"]
    assert found.tolist() == [example + 0.5 if example >= 0 else 0.0 for example in batch.document_ids.tolist()]


def test_a_table_with_holes_does_not_come_to_be(tmp_path: Path, store: TokenStore) -> None:
    writer = SignalWriter(tmp_path / "table", store, "example", {"score": (np.float32, ())}, {})
    writer.put(3, {"score": np.float32(1)})
    with pytest.raises(DataError, match=r"signals are missing[\s\S]*11 rows"):
        writer.close()
    with pytest.raises(DataError, match="no stored signals"):
        SignalTable(tmp_path / "table", store)


def test_tables_of_something_else_are_refused(tmp_path: Path, store: TokenStore) -> None:
    folder = by_token(tmp_path / "table", store)
    with pytest.raises(DataError, match="of another model"):
        SignalTable(folder, store, {"model": "other"})
    other = TokenStore(write_store(tmp_path / "other", 12, seed=1))
    with pytest.raises(DataError, match="of another store"):
        SignalTable(folder, other)
    with pytest.raises(DataError, match="holds a table already"):
        SignalWriter(folder, store, "token", {}, {})
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(DataError, match="another version"):
        SignalTable(folder, store)


def test_a_column_that_lost_its_end_is_refused(tmp_path: Path, store: TokenStore) -> None:
    folder = by_token(tmp_path / "table", store)
    whole = (folder / "a.npy").read_bytes()
    (folder / "a.npy").write_bytes(whole[:-4])
    with pytest.raises(DataError, match="cannot be read"):
        SignalTable(folder, store)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    (folder / "a.npy").write_bytes(bytes(flipped))
    with pytest.raises(DataError, match="not what was written"):
        SignalTable(folder, store)
    np.save(folder / "a.npy", np.zeros(3, np.int32))
    with pytest.raises(DataError, match="not the store's length"):
        SignalTable(folder, store)
