"""Worker processes: results in order, errors as they were raised, nothing lost when a process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain_lib.data.workers import MOST_DEATHS, OrderedPool
from posttrain_lib.errors import DataError


def make_state(base: int) -> dict[str, int]:
    return {"base": base, "pid": os.getpid()}


def add(state: dict[str, int], item: int) -> int:
    time.sleep(0.02 if item % 3 == 0 else 0)  # so that later items finish first
    return state["base"] + item


def fail(state: dict[str, int], item: int) -> int:
    raise DataError("no good", where=f"item {item}")


def die_once(state: dict[str, int], item: tuple[int, str]) -> int:
    number, mark = item
    if number == 5 and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_always(state: dict[str, int], item: int) -> int:
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.fixture
def pools() -> Iterator[list[OrderedPool]]:
    made: list[OrderedPool] = []
    yield made
    for pool in made:
        pool.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_warm_processes_have_their_state(pools: list[OrderedPool], workers: int) -> None:
    pools.append(OrderedPool(workers, make_state, (0,), pid_of, str))
    pools[0].warm(wait=True)
    pids = set(pools[0].map(range(8)))
    started = {os.getpid()} if workers == 0 else set(pools[0]._executor._processes)
    assert pids <= started and len(started) == max(1, workers)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order(pools: list[OrderedPool], workers: int) -> None:
    pools.append(OrderedPool(workers, make_state, (100,), add, str))
    assert list(pools[0].map(range(20))) == [100 + item for item in range(20)]
    assert list(pools[0].map(range(3))) == [100, 101, 102]


def test_items_are_taken_as_they_are_needed(pools: list[OrderedPool]) -> None:
    pools.append(OrderedPool(1, make_state, (0,), add, str))
    taken = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = pools[0].map(items(), ahead=4)
    assert next(results) == 0
    assert len(taken) <= 6


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_comes_as_it_was_raised(pools: list[OrderedPool], workers: int) -> None:
    pools.append(OrderedPool(workers, make_state, (0,), fail, str))
    with pytest.raises(DataError, match="no good") as caught:
        list(pools[0].map(range(3)))
    assert "item 0" in str(caught.value)


def test_a_state_that_cannot_be_made_says_why(pools: list[OrderedPool]) -> None:
    pools.append(OrderedPool(1, broken_state, (), add, str))
    with pytest.raises(DataError, match="no tokenizer there"):
        list(pools[0].map(range(3)))
    assert pools[0].deaths == 0


def broken_state() -> None:
    raise DataError("no tokenizer there")


def test_a_killed_process_costs_no_result(pools: list[OrderedPool], tmp_path: Path) -> None:
    mark = str(tmp_path / "died")
    pools.append(OrderedPool(2, make_state, (0,), die_once, str))
    assert list(pools[0].map([(number, mark) for number in range(12)])) == list(range(12))
    assert pools[0].deaths == 1


def test_two_lines_of_work_share_the_processes(pools: list[OrderedPool], tmp_path: Path) -> None:
    mark = str(tmp_path / "died")
    pools.append(OrderedPool(2, make_state, (0,), die_once, str))
    lines = [pools[0].map([(number, mark) for number in range(12)]) for _ in range(2)]
    assert list(zip(*lines, strict=True)) == [(number, number) for number in range(12)]
    assert pools[0].deaths == 1


def test_work_that_always_kills_its_process_is_named(pools: list[OrderedPool]) -> None:
    pools.append(OrderedPool(1, make_state, (0,), die_always, lambda item: f"rows {item}"))
    results = pools[0].map(range(12), ahead=4)  # others are under way when it dies: they are not to blame
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match=f"{MOST_DEATHS} times") as caught:
        next(results)
    assert "rows 5" in str(caught.value)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import time; from posttrain_lib.data.workers import OrderedPool\n"
        "from tests.unit.data import test_workers as t\n"
        "if __name__ == '__main__':\n"
        "    pool = OrderedPool(1, t.make_state, (0,), t.pid_of, str)\n"
        "    print(next(pool.map([0])), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


def pid_of(state: dict[str, int], item: int) -> int:
    return state["pid"]
