"""Laying tokens out: the compiled loop does what the plain one does, and touches nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data import kernels
from posttrain_lib.data.packing import make_packer


@given(
    segments=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5), st.integers(0, 3)), max_size=12),
    seed=st.integers(0, 99),
)
def test_the_compiled_loop_is_the_plain_one(segments: list[tuple[int, int, int]], seed: int) -> None:
    """Segments (length, first position, gap before it) in shuffled order, gaps stay as they were."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 1000, 300).astype(np.int32)
    weights = rng.random(300).astype(np.float32)
    tokens.flags.writeable = weights.flags.writeable = False  # as mapped files are
    lengths, firsts, gaps = (np.array([s[i] for s in segments], np.int32) for i in range(3))
    places = (np.cumsum(lengths + gaps) - lengths).astype(np.int64)
    begins = rng.integers(0, 280, len(segments))
    order = rng.permutation(len(segments))
    results = []
    for run in (kernels.lay_out_plain, kernels.lay_out()):
        arrays = [np.full(400, 7, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32)]
        run(tokens, weights, begins[order], lengths[order], firsts[order], places[order], *arrays)
        results.append(arrays)
    for plain, compiled in zip(*results, strict=True):
        assert np.array_equal(plain, compiled)
    for begin, length, first, place in zip(begins, lengths, firsts, places, strict=True):
        assert results[0][0][place : place + length].tolist() == tokens[begin : begin + length].tolist()
        assert results[0][3][place : place + length].tolist() == list(range(first, first + length))


@given(
    rows=st.lists(st.lists(st.integers(1, 9), max_size=4).filter(lambda row: sum(row) <= 20), max_size=6),
    longest=st.integers(1, 8),
)
def test_rows_are_placed_and_padded_as_the_plain_version_does(rows: list[list[int]], longest: int) -> None:
    lengths = np.array([length for row in rows for length in row], np.int32)
    per_row = np.array([len(row) for row in rows], np.int64)
    results = []
    for place, pad in ((kernels.place_rows_plain, kernels.pad_plain), (kernels.place_rows(), kernels.pad())):
        bounds, segments = place(lengths, per_row, 20, longest)
        arrays = [np.full(20 * len(rows), 7, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32)]
        pad(bounds, segments, *arrays)
        results.append((bounds, segments, *arrays))
    for plain, compiled in zip(*results, strict=True):
        assert plain.dtype == compiled.dtype and np.array_equal(plain, compiled)
    bounds, segments, token_ids, *_, positions = results[0]
    sizes = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == 20 * len(rows) and (sizes > 0).all()
    assert segments[segments >= 0].tolist() == list(range(len(lengths))) and np.array_equal(
        sizes[segments >= 0], lengths
    )
    assert (sizes[segments < 0] <= longest).all()
    for begin, end, segment in zip(bounds, bounds[1:], segments, strict=False):
        assert (token_ids[begin:end] == (7 if segment >= 0 else 0)).all()
        assert positions[begin:end].tolist() == ([7] * (end - begin) if segment >= 0 else list(range(end - begin)))


@given(values=st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-30]), max_size=50))
def test_places_that_are_not_zero(values: list[float]) -> None:
    array = np.array(values, np.float32)
    for nonzero in (kernels.nonzero_plain, kernels.nonzero()):
        places = np.empty(len(array), np.int32)
        assert np.array_equal(places[: nonzero(array, places)], np.flatnonzero(array))


def test_a_machine_without_numba_uses_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_numba", lambda: False)
    kernels.lay_out.cache_clear()
    assert kernels.lay_out() is kernels.lay_out_plain
    kernels.lay_out.cache_clear()


def test_warming_leaves_nothing_to_compile() -> None:
    """Another signature would be compiled at the first step of every run."""
    if not kernels.has_numba():
        pytest.skip("numba is not installed")
    from posttrain_lib.data import compiled

    kernels.warm()
    known = {name: len(getattr(compiled, name).signatures) for name in ("lay_out_loop", "pack_loop", "place_loop")}
    tokens, weights = np.arange(9, dtype=np.int32), np.ones(9, np.float32)
    tokens.flags.writeable = weights.flags.writeable = False
    arrays = [np.zeros(9, kind) for kind in (np.int32, np.int32, np.float32, np.int32)]
    lengths, places = np.array([3, 2], np.int32), np.array([0, 3])
    kernels.lay_out()(tokens, weights, places, lengths, np.zeros(2, np.int32), places, *arrays)
    kernels.place_rows()(lengths, np.array([2]), 9, 4)
    make_packer(9, 4).feed(np.arange(2), lengths, 1)
    assert known == {name: len(getattr(compiled, name).signatures) for name in known}
