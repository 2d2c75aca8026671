"""Paths of segments, by hand and against the oracle; what does not fit is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.errors import DataError
from posttrain_lib.schema.batches import PackedBatch
from posttrain_lib.schema.shared_prefix import SharedPrefixes
from tests.oracles.prefix_tree import documents, row_of, tree_of


def _batch(parents: list[int] | None, positions: list[int]) -> PackedBatch:
    """Three segments: places 0-2, 3-4 and 5."""
    return PackedBatch(
        token_ids=np.arange(6),
        target_ids=np.arange(6),
        loss_weights=np.zeros(6, np.float32),
        positions=np.array(positions),
        cu_seqlens=np.array([0, 3, 5, 6], np.int32),
        supervised_index=np.array([], np.int64),
        document_sources=np.zeros(3, np.int32),
        document_ids=np.arange(3),
        max_seqlen=3,
        real_tokens=6,
        parents=None if parents is None else np.array(parents, np.int32),
    )


def test_a_branch_inside_an_ancestor_of_the_parent() -> None:
    # 1 goes on after two tokens of 0, 2 after one token of 0, found by way of 1
    prefixes = SharedPrefixes.of([0, 3, 5, 6], [0, 1, 2, 2, 3, 1], [-1, 0, 1])
    assert prefixes.lengths == (3, 2, 1)
    assert prefixes.contexts == (0, 2, 1)
    assert prefixes.key_lengths == (3, 4, 2)
    assert prefixes.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 5]
    assert prefixes.cu_seqlens_k.tolist() == [0, 3, 7, 9]
    assert (prefixes.key_index.dtype, prefixes.cu_seqlens_k.dtype) == (np.int64, np.int32)
    assert prefixes.max_path == 4
    assert prefixes.shares


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 7)), min_size=1, max_size=12))
def test_keys_are_the_documents_places(choices: list[tuple[int, int, int]]) -> None:
    tree = tree_of(choices, depth=5)
    prefixes = SharedPrefixes.of(*row_of(tree))
    assert prefixes.key_index.tolist() == [place for document in documents(tree) for place in document]
    assert prefixes.key_lengths == tuple(len(document) for document in documents(tree))
    assert prefixes.shares == any(cut for _, cut, _ in tree)


def test_a_parent_of_which_nothing_is_shared_is_a_document_of_its_own() -> None:
    assert not SharedPrefixes.of([0, 3, 5], [0, 1, 2, 0, 1], [-1, 0]).shares


@pytest.mark.parametrize(
    ("positions", "parents", "got"),
    [
        ([0, 1, 2, 2, 3, 1], [-1, 1, 0], "segment 1.*parent 1"),
        ([0, 1, 2, 2, 3, 1], [-1, 2, -1], "segment 1.*parent 2"),
        ([0, 1, 2, 2, 3, 1], [-1, -2, 0], "segment 1.*parent -2"),
        ([0, 1, 2, 2, 3, 1], [-1, 9, 0], "segment 1.*parent 9"),
        ([0, 1, 2, 4, 5, 0], [-1, 0, -1], "segment 1.*first position 4 and a path of 3 tokens of segment 0"),
        ([0, 1, 2, 1, 2, 4], [-1, 0, 1], "segment 2.*first position 4 and a path of 3 tokens of segment 1"),
        ([0, 1, 2, 0, 1, 3], [-1, -1, -1], "segment 2.*first position 3 and no parent"),
        ([0, 1, 2, -1, 0, 0], [-1, 0, -1], "segment 1.*first position -1"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_segment(positions: list[int], parents: list[int], got: str) -> None:
    with pytest.raises(DataError, match=f"(?s){got}"):
        _batch(parents, positions)


def test_a_batch_with_parents_has_its_paths_and_keeps_them_when_converted() -> None:
    batch = _batch([-1, 0, 1], [0, 1, 2, 2, 3, 1])
    assert batch.prefixes is not None
    moved = batch.map(lambda array: array + 100)
    assert moved.parents.tolist() == [99, 100, 101]
    assert moved.prefixes is not None
    assert moved.prefixes.key_index.tolist() == (batch.prefixes.key_index + 100).tolist()
    assert moved.prefixes.cu_seqlens_k.tolist() == [100, 103, 107, 109]
    assert moved.prefixes.lengths == batch.prefixes.lengths


def test_a_batch_of_whole_documents_has_none() -> None:
    batch = _batch(None, [0, 1, 2, 0, 1, 0])
    assert batch.prefixes is None
    assert batch.map(lambda array: array).prefixes is None
    shared = _batch([-1, 0, 1], [0, 1, 2, 2, 3, 1])
    assert dataclasses.replace(shared, parents=None, positions=batch.positions).prefixes is None
