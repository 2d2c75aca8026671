"""The systems that the packing benchmark trains compute one loss: their rates compare like with like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_lib.data.loader import PackedLoader
from posttrain_lib.data.store_feed import StoreFeed
from tests.benchmarks.packing_data import written_store
from tests.benchmarks.packing_training import (
    VOCABULARY,
    own_loss,
    own_model,
    padded_batch,
    transformers_loss,
    transformers_model,
)


def test_packed_padded_and_transformers_have_one_loss(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, VOCABULARY, length).astype(np.int32) for length in (5, 40, 17)]
    store = written_store(tmp_path, ((tokens, np.ones(len(tokens), np.float32)) for tokens in documents))
    feed = StoreFeed(store, row_tokens=64, epochs=1)
    own = own_model()
    with torch.no_grad(), PackedLoader(feed, row_tokens=64, rows_per_step=1, background=False) as loader:
        packed = [float(own_loss(batch)(own)) for step in loader for batch in step.micro_batches]
        padded = float(own_loss(padded_batch(documents, 40))(own))
        theirs = float(transformers_loss(documents, 40)(transformers_model()))
    # float32: rounding of 59 terms of about 8, in other orders
    assert sum(packed) == pytest.approx(padded, rel=1e-5) == theirs
