"""Where the time of a step goes: parts, parts within parts, and waits for collectives."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from posttrain_lib.training import timing
from posttrain_lib.training.timing import KINDS, StepClock

CPU = torch.device("cpu")


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    moved = Hands()
    monkeypatch.setattr(timing, "_Moment", lambda: _At(moved.now))
    return moved


class _At(float):
    def until(self, later: float) -> float:
        return later - self


def test_parts_and_the_rest_are_the_whole(hands: Hands) -> None:
    clock = StepClock(CPU)
    clock.begin(7)
    with clock.part("data"):
        hands.work(1)
    for _ in range(2):
        with clock.part("forward"):
            hands.work(2)
        hands.work(0.5)
    split = clock.split()
    assert split is not None
    assert (split.step, split.total) == (7, 6)
    assert split.seconds == {"data": 1, "forward": 4, "other": 1}
    with clock.part("checkpoint"):  # asked again when more is done
        hands.work(3)
    later = clock.split()
    assert later is not None and later.total == 9 and later.seconds["checkpoint"] == 3


def test_what_lies_inside_a_part_is_taken_from_it_once(hands: Hands) -> None:
    clock = StepClock(CPU)
    clock.begin(1)
    with clock.part("backward"):
        hands.work(2)
        with clock.part("communication"):
            hands.work(3)
            with clock.part("communication"):
                hands.work(1)
    split = clock.split()
    assert split is not None and split.seconds == {"backward": 2, "communication": 4, "other": 0}


def test_a_part_that_fails_is_closed(hands: Hands) -> None:
    clock = StepClock(CPU)
    clock.begin(1)
    with pytest.raises(ValueError, match="a bad row"), clock.part("forward"):
        hands.work(1)
        raise ValueError("a bad row")
    clock.begin(2)
    hands.work(5)
    split = clock.split()
    assert split is not None and split.seconds == {"other": 5}


def test_before_the_first_step_nothing_is_timed() -> None:
    clock = StepClock(CPU)
    with clock.part("evaluation"):
        pass
    assert clock.split() is None


class _Handle:
    """What stands in for torch's own, which only a group of processes has."""

    def wait(self) -> str:
        time.sleep(0.01)
        return "done"


def test_waits_of_this_thread_are_communication_and_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "Work", _Handle)
    original = _Handle.wait
    clock = StepClock(CPU, communication=True)
    clock.begin(1)
    with clock.waits():
        with clock.part("backward"):
            assert _Handle().wait() == "done"
        other = threading.Thread(target=_Handle().wait)  # a checkpoint that is written beside
        other.start()
        other.join()
    assert _Handle.wait is original
    split = clock.split()
    assert split is not None
    assert split.seconds["communication"] >= 0.01  # it slept that long
    assert set(split.seconds) == {"backward", "communication", "other"}


def test_one_rank_alone_looks_for_no_collectives() -> None:
    before = dist.Work.wait
    with StepClock(CPU).waits():
        assert dist.Work.wait is before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_split_is_of_the_step_before() -> None:
    clock = StepClock(torch.device("cuda", 0))
    weight = torch.randn(2048, 2048, device="cuda")
    for step in (1, 2):
        clock.begin(step)
        with clock.part("forward"):
            weight @ weight
        split = clock.split()
        assert (split is None) == (step == 1)
    assert split is not None and split.step == 1
    assert set(split.seconds) == {"forward", "other"} <= {*KINDS, "other"}
    assert 0 < split.seconds["forward"] <= split.total
