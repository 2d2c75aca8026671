"""The packer: nothing lost, nothing too long, oldest first, full rows, and a state that resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_lib.data.packing import CompiledPacker, Packer, Row, Rows, StreamingPacker, make_packer
from posttrain_lib.errors import DataError

LENGTHS = st.lists(st.integers(1, 64), max_size=120)
BUFFERS = st.integers(1, 40)
ROW_TOKENS = 64
ALL = 10**6

Make = Callable[[int, int], Packer]
both = pytest.mark.parametrize("make", [CompiledPacker, StreamingPacker])


def _push(packer: Packer, unit: int, length: int) -> Rows:
    taken, rows = packer.feed(np.array([unit]), np.array([length], np.int32), 1)
    assert taken == 1
    return rows


def _pack(make: Make, lengths: list[int], buffer: int) -> list[Row]:
    packer = make(ROW_TOKENS, buffer)
    taken, rows = packer.feed(np.arange(len(lengths)), np.array(lengths, np.int32), ALL)
    assert taken == len(lengths)
    return [*rows, *packer.flush(ALL)]


@given(
    lengths=LENGTHS,
    buffer=BUFFERS,
    wanted=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    look_ahead=st.one_of(st.none(), st.integers(1, 50)),
)
def test_the_compiled_packer_is_the_plain_one(
    lengths: list[int], buffer: int, wanted: list[int], look_ahead: int | None
) -> None:
    """Rows, what was taken in, and the state, after every call, however many rows a call asks for."""
    packers = [CompiledPacker(ROW_TOKENS, buffer), StreamingPacker(ROW_TOKENS, buffer)]
    ids, sizes, at, turn = np.arange(len(lengths)) + 7, np.array(lengths, np.int32), 0, 0
    while True:
        count = wanted[turn % len(wanted)] if turn < 50 else ALL
        (taken, rows), (others, theirs) = (packer.feed(ids[at:], sizes[at:], count, look_ahead) for packer in packers)
        assert taken == others and [*rows] == [*theirs] and packers[0].state() == packers[1].state()
        at, turn = at + taken, turn + 1
        if count == ALL:
            break
    assert [*packers[0].flush(ALL)] == [*packers[1].flush(ALL)]


@both
def test_a_row_that_leaves_enough_for_another_is_followed_by_it_before_more_is_taken_in(make: Make) -> None:
    """The first row takes 33 of 318 tokens, more than the four rows' worth that are waited for: the last unit, which
    would fit behind the second, comes too late for it."""
    packer = make(64, 20)
    lengths = np.array([33, 62, 64, 63, 33, 63, 2], np.int32)
    taken, rows = packer.feed(np.arange(7), lengths, ALL, 2)
    assert (taken, [*rows]) == (7, [(0,), (1,)])
    assert [*packer.flush(ALL)] == [(2,), (3,), (4, 6), (5,)]


@both
@given(lengths=LENGTHS, buffer=BUFFERS)
def test_every_unit_once_and_no_row_too_long(make: Make, lengths: list[int], buffer: int) -> None:
    rows = _pack(make, lengths, buffer)
    assert sorted(unit for row in rows for unit in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[unit] for unit in row) <= ROW_TOKENS for row in rows)


@both
@given(lengths=LENGTHS, buffer=BUFFERS)
def test_the_oldest_opens_each_row_so_that_the_delay_is_bounded(make: Make, lengths: list[int], buffer: int) -> None:
    packer = make(ROW_TOKENS, buffer)
    rows_when_pushed, left_in_row, rows = {}, {}, 0
    for unit, length in enumerate(lengths):
        waiting = packer.state()
        rows_when_pushed[unit] = rows
        for row in _push(packer, unit, length):
            rows += 1
            assert row[0] == min([*waiting, unit])
            left_in_row.update(dict.fromkeys(row, rows))
    assert all(row - rows_when_pushed[unit] <= buffer for unit, row in left_in_row.items())
    assert all(rows - rows_when_pushed[unit] < buffer for unit in packer.state())


@both
@given(lengths=LENGTHS, buffer=BUFFERS)
def test_a_row_has_room_for_nothing_that_was_left_behind(make: Make, lengths: list[int], buffer: int) -> None:
    packer = make(ROW_TOKENS, buffer)
    for unit, length in enumerate(lengths):
        for row in _push(packer, unit, length):
            space = ROW_TOKENS - sum(lengths[each] for each in row)
            assert all(lengths[waiting] > space for waiting in packer.state())


@both
@given(lengths=LENGTHS, buffer=BUFFERS, cut=st.integers(0, 120))
def test_resumed_equals_uninterrupted(make: Make, lengths: list[int], buffer: int, cut: int) -> None:
    packer, rows = make(ROW_TOKENS, buffer), []
    for unit, length in enumerate(lengths):
        if unit == cut:
            state = json.loads(json.dumps(packer.state()))
            packer = make(ROW_TOKENS, buffer)
            packer.load_state(state, [lengths[waiting] for waiting in state])
        rows.extend(_push(packer, unit, length))
    assert [*rows, *packer.flush(ALL)] == _pack(make, lengths, buffer)


@both
def test_takes_the_longest_that_fits_and_of_equals_the_oldest(make: Make) -> None:
    packer = make(10, 5)
    lengths = np.array([4, 6, 3, 6, 2], np.int32)
    taken, rows = packer.feed(np.arange(4), lengths[:4], ALL)
    assert (taken, [*rows]) == (4, [])
    taken, rows = packer.feed(np.arange(4, 5), lengths[4:], ALL)
    assert (taken, [*rows]) == (1, [(0, 1)])
    assert [*packer.flush(ALL)] == [(2, 3), (4,)]


@both
def test_stops_taking_units_in_when_it_has_made_the_rows(make: Make) -> None:
    packer = make(10, 2)
    units, lengths = np.arange(6), np.full(6, 10, np.int32)
    taken, rows = packer.feed(units, lengths, 2)
    assert (taken, [*rows]) == (3, [(0,), (1,)])
    assert packer.state() == [2]


@both
@pytest.mark.parametrize(
    ("row_tokens", "median", "spread", "smallest"),
    [(4096, 270, 1.0, 8), (8192, 750, 1.1, 8), (2048, 60, 1.5, 8)],
)
def test_fill_on_skewed_lengths(make: Make, row_tokens: int, median: float, spread: float, smallest: int) -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(median), spread, 8000).clip(smallest, row_tokens)
    lengths = drawn.astype(np.int32)
    rows = make(row_tokens, 256).feed(np.arange(len(lengths)), lengths, ALL)[1]
    used = sum(int(lengths[list(row)].sum()) for row in rows)
    assert used / (len(rows) * row_tokens) >= 0.98


@both
@pytest.mark.parametrize("length", [0, -1, ROW_TOKENS + 1])
def test_what_fits_no_row_is_named(make: Make, length: int) -> None:
    with pytest.raises(DataError, match="example 7") as caught:
        make(ROW_TOKENS, 4).feed(np.array([3, 7]), np.array([1, length], np.int32), 1)
    assert "row_tokens" in str(caught.value)


@both
def test_nothing_waits_nothing_comes(make: Make) -> None:
    packer = make(ROW_TOKENS, 4)
    assert [*packer.flush(ALL)] == [] and packer.state() == [] and len(packer) == 0


@given(
    rows=st.lists(st.lists(st.integers(0, 99), max_size=4).map(tuple), max_size=6),
    more=st.lists(st.lists(st.integers(0, 99), max_size=4).map(tuple), max_size=6),
    empty=st.integers(0, 3),
    data=st.data(),
)
def test_rows_are_what_lists_of_tuples_are(rows: list[Row], more: list[Row], empty: int, data: st.DataObject) -> None:
    held = Rows.of(rows)
    assert [*held] == rows and len(held) == len(rows)
    assert [*Rows.joined([held, Rows.of(more)])] == rows + more and [*Rows.joined([])] == []
    assert [*held.filled_up(len(rows) + empty)] == rows + [()] * empty
    numbers = data.draw(st.lists(st.sampled_from(range(len(rows))), max_size=6)) if rows else []
    assert [*held.take(np.array(numbers, np.int64))] == [rows[number] for number in numbers]


@both
def test_impossible_sizes_are_refused(make: Make) -> None:
    for sizes in [(0, 4), (4, 0)]:
        with pytest.raises(DataError):
            make(*sizes)


def test_a_machine_without_numba_packs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_packer(8, 2), CompiledPacker)
    monkeypatch.setattr("posttrain_lib.data.kernels.has_numba", lambda: False)
    assert isinstance(make_packer(8, 2), StreamingPacker)
