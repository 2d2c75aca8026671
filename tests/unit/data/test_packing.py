"""The packer: nothing lost, nothing too long, oldest first, full rows, and a state that resumes exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.packing import StreamingPacker
from posttrain_lib.errors import DataError

LENGTHS = st.lists(st.integers(1, 64), max_size=120)
ROW_TOKENS = 64


def _pack(lengths: list[int], buffer: int) -> list[tuple[int, ...]]:
    packer = StreamingPacker(ROW_TOKENS, buffer)
    rows = [row for example, length in enumerate(lengths) for row in packer.push(example, length)]
    return rows + packer.flush()


@given(lengths=LENGTHS, buffer=st.integers(1, 40))
def test_every_example_once_and_no_row_too_long(lengths: list[int], buffer: int) -> None:
    rows = _pack(lengths, buffer)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[example] for example in row) <= ROW_TOKENS for row in rows)


@given(lengths=LENGTHS, buffer=st.integers(1, 40))
def test_the_oldest_opens_each_row_so_that_the_delay_is_bounded(lengths: list[int], buffer: int) -> None:
    packer = StreamingPacker(ROW_TOKENS, buffer)
    rows_when_pushed, left_in_row, rows = {}, {}, 0
    for example, length in enumerate(lengths):
        waiting = packer.state()
        rows_when_pushed[example] = rows
        for row in packer.push(example, length):
            rows += 1
            assert row[0] == min([*waiting, example])
            left_in_row.update(dict.fromkeys(row, rows))
    assert all(row - rows_when_pushed[example] <= buffer for example, row in left_in_row.items())
    assert all(rows - rows_when_pushed[example] < buffer for example in packer.state())


@given(lengths=LENGTHS, buffer=st.integers(1, 40))
def test_a_row_has_room_for_nothing_that_was_left_behind(lengths: list[int], buffer: int) -> None:
    packer = StreamingPacker(ROW_TOKENS, buffer)
    for example, length in enumerate(lengths):
        for row in packer.push(example, length):
            space = ROW_TOKENS - sum(lengths[each] for each in row)
            assert all(lengths[waiting] > space for waiting in packer.state())


@given(lengths=LENGTHS, buffer=st.integers(1, 40), cut=st.integers(0, 120))
def test_resumed_equals_uninterrupted(lengths: list[int], buffer: int, cut: int) -> None:
    packer, rows = StreamingPacker(ROW_TOKENS, buffer), []
    for example, length in enumerate(lengths):
        if example == cut:
            state = json.loads(json.dumps(packer.state()))
            packer = StreamingPacker(ROW_TOKENS, buffer)
            packer.load_state(state, [lengths[waiting] for waiting in state])
        rows.extend(packer.push(example, length))
    assert rows + packer.flush() == _pack(lengths, buffer)


def test_takes_the_longest_that_fits_and_of_equals_the_oldest() -> None:
    packer = StreamingPacker(10, 5)
    lengths = [4, 6, 3, 6, 2]
    assert packer.push(0, 4) == [] and packer.push(1, 6) == [] and packer.push(2, 3) == [] and packer.push(3, 6) == []
    assert packer.push(4, lengths[4]) == [(0, 1)]
    assert packer.flush() == [(2, 3), (4,)]


@pytest.mark.parametrize(
    ("row_tokens", "median", "spread", "smallest"),
    [(4096, 270, 1.0, 8), (8192, 750, 1.1, 8), (2048, 60, 1.5, 8)],
)
def test_fill_on_skewed_lengths(row_tokens: int, median: float, spread: float, smallest: int) -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(median), spread, 8000).clip(smallest, row_tokens).astype(int)
    packer = StreamingPacker(row_tokens, 256)
    rows = [row for example, length in enumerate(lengths.tolist()) for row in packer.push(example, length)]
    used = sum(int(lengths[list(row)].sum()) for row in rows)
    assert used / (len(rows) * row_tokens) >= 0.98


@pytest.mark.parametrize("length", [0, -1, ROW_TOKENS + 1])
def test_what_fits_no_row_is_named(length: int) -> None:
    with pytest.raises(DataError, match="example 7") as caught:
        StreamingPacker(ROW_TOKENS, 4).push(7, length)
    assert "row_tokens" in str(caught.value)


def test_nothing_waits_nothing_comes() -> None:
    packer = StreamingPacker(ROW_TOKENS, 4)
    assert packer.flush() == [] and packer.pop_row() == () and len(packer) == 0


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(DataError):
        StreamingPacker(0, 4)
    with pytest.raises(DataError):
        StreamingPacker(4, 0)
