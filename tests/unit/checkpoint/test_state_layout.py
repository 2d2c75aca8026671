"""Boxes: overlaps, chunks that make a box again, and copies that are shared out whole and once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.checkpoint import state_layout
from posttrain_lib.checkpoint.state_layout import Box, Part, box_key, chunks_of, owned

SIZES = st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple)


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


@given(SIZES, st.sampled_from([1, 2, 8]), st.integers(8, 300))
def test_chunks_are_the_box_in_the_order_of_its_bytes(shape: tuple[int, ...], item: int, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_layout, "CHUNK_BYTES", limit)
        values = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
        chunks = list(chunks_of(whole(shape), item))
    assert all(chunk.numel * item <= limit for chunk in chunks)
    flat = [values[chunk.within(whole(shape))].ravel() for chunk in chunks]
    assert np.array_equal(np.concatenate(flat), values.ravel())


@given(st.data())
def test_an_overlap_is_what_both_have(data: st.DataObject) -> None:
    dims = data.draw(st.integers(0, 3))
    corner = st.lists(st.integers(0, 5), min_size=dims, max_size=dims).map(tuple)
    size = st.lists(st.integers(1, 5), min_size=dims, max_size=dims).map(tuple)
    one, other = (Box(data.draw(corner), data.draw(size)) for _ in range(2))

    def cells(box: Box) -> set[tuple[int, ...]]:
        return set(itertools.product(*[range(b, b + s) for b, s in zip(box.begin, box.shape, strict=True)]))

    found = one.overlap(other)
    assert (cells(found) if found else set()) == cells(one) & cells(other)


@given(st.integers(1, 5), st.lists(st.integers(1, 4000), min_size=1, max_size=6))
def test_copies_are_written_once_and_by_someone(ranks: int, rows: list[int]) -> None:
    """Sizes on both sides of the one from which a copy is cut among its holders."""
    parts = [Part(f"t{n}", whole((count, 8)), torch.zeros(count, 8)) for n, count in enumerate(rows)]
    holders = {box_key(part): list(range(ranks)) for part in parts}
    written = [part for rank in range(ranks) for part in owned(parts, holders, rank)]
    for n, count in enumerate(rows):
        spans = sorted((part.box.begin[0], part.box.shape[0]) for part in written if part.name == f"t{n}")
        assert [begin for begin, _ in spans] == [sum(size for _, size in spans[:at]) for at in range(len(spans))]
        assert sum(size for _, size in spans) == count
